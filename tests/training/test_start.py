"""How a run starts: what it says first, and what it has not imported by then."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_runs import config, interrupted

from solo_ext.training.pretrain import pretrain
from solo_ext.training.start import is_first

SLOW = ("lightning", "torchvision", "timm", "h5py", "torch._dynamo", "matplotlib", "scipy")  # seconds, all together


@pytest.mark.parametrize("words, line", [(["max_epochs=1"], "cpu, "), (["--cfg"], "name: byol")])
def test_the_first_line_is_out_before_what_is_slow_to_import(words, line, tmp_path):
    command = ["pretrain", "fashion_mnist_mini/byol", "accelerator=cpu", f"checkpoint.dir={tmp_path}", *words]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "solo_ext", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        imported = set()
        for output in process.stdout:
            if output.startswith("import time:"):
                imported.add(output.rpartition("|")[2].strip())
            elif line in output:
                break
        else:
            pytest.fail("there is no such line")
        process.kill()
    assert "torch" in imported and not imported & {*SLOW}


@pytest.mark.parametrize(
    "module, slow",
    [
        ("solo_ext.training.pretrain", ["solo_ext.training.trainer", "solo_ext.data.modules", "timm"]),
        ("solo_ext.data.datasets", ["torchvision", "h5py", "lightning"]),
        ("solo_ext.zoo.store, solo_ext.runs.checkpoints", ["timm", "torchvision", "lightning"]),
    ],
)
def test_the_first_line_comes_before_what_is_slow_to_import(module, slow):
    code = f"import sys, {module}; print(*(m in sys.modules for m in {slow}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"] * len(slow), done.stderr


def test_the_first_line_says_where_a_run_lies_and_what_it_resumes(tmp_path, monkeypatch, capsys):
    cfg = config(tmp_path)
    folder, _ = interrupted(cfg, monkeypatch)
    follow = f"; follow: solo-ext runs {shlex.quote(str(folder))} --watch 5"
    assert capsys.readouterr().out.splitlines()[0] == f"tiny: cpu, {folder}{follow}"
    reads = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (reads.append(1), original(*args, **kwargs))[1])
    pretrain(cfg)
    resumed = f", resuming tiny-{folder.name}-ep=1-step=1.ckpt"
    assert capsys.readouterr().out.splitlines()[0] == f"tiny: cpu, {folder}{resumed}{follow}"
    assert len(reads) == 1, "the checkpoint is read once"


@pytest.mark.parametrize(
    "variables, first",
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # srun started torchrun
        ({"RANK": "3", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),  # Lightning, in a job
        ({"SLURM_PROCID": "2"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_which_process_is_the_first(monkeypatch, variables, first):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first
