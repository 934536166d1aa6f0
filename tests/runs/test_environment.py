"""What a run's environment.json says, and does not."""

import json
import socket
import subprocess
import sys

import torch
from tiny_runs import CANARY

from solo_ext.runs.environment import environment


def test_environment_names_versions_but_neither_host_nor_secrets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["solo-ext", "pretrain", f"++wandb.api_key={CANARY}", "seed=1"])
    here = environment()
    text = json.dumps(here)
    assert CANARY not in text and socket.gethostname() not in text
    assert here["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert here["command"][-1] == "seed=1" and here["cores"] >= 1


def test_versions_are_known_without_importing_the_packages():
    code = "import sys, solo_ext.runs.environment as e; e.environment(); print({'timm', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr
