"""The environment.json of a run: versions, code, hardware."""

import hashlib
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import solo_ext
from solo_ext.files import cores
from solo_ext.runs.run import COMMAND

PACKAGES = ("torch", "torchvision", "lightning", "timm", "solo-ext")
_SECRET = re.compile(r"(?i)((?:key|token|secret|password)\w*=).+")


def environment() -> dict[str, Any]:
    """Versions, commit, hardware, command line and time of this process; the host only as a hash."""
    command = shlex.split(os.environ.get(COMMAND, "")) or sys.argv
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [_SECRET.sub(r"\1***", word) for word in command],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "os": platform.platform(),
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _version(name: str) -> str | None:
    try:  # of the metadata, since importing timm takes a second
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # solo-ext in a checkout that is not installed
        return solo_ext.__version__ if name == "solo-ext" else None


def _commit() -> dict[str, Any] | None:
    """{"hash", "dirty": whether `solo_ext` or `scripts` is changed} of the checkout; None without one."""
    root = Path(solo_ext.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "solo_ext", "scripts"]
    try:
        lines = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid "))
    return {"hash": commit, "dirty": not all(line.startswith("# ") for line in lines)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
