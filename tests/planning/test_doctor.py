"""`solo-ext doctor` tries everything out, and names the command that brings what is missing."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata

import pytest
import torch
from conftest import ROOT

from solo_ext.cli.main import main
from solo_ext.data import modules
from solo_ext.planning import doctor

Usage = namedtuple("Usage", "total used free")


def lines(capsys):
    assert main(["doctor"]) == 0
    return capsys.readouterr().out.splitlines()


def line(found, part):
    [text] = [text for text in found if text[2:].startswith(part)]
    return text


def test_what_works_is_found_by_trying(capsys):
    found = lines(capsys)
    assert f"torch {torch.__version__.partition('+')[0]}" in line(found, "versions")
    works = line(found, "precision").partition(" work")[0]
    assert "32" in works and "64" in works and "16-mixed" not in works.replace("bf16-mixed", "")
    formats = line(found, "formats")
    assert all(name in formats for name in ("image_folder", "tensor", "h5"))
    assert "GiB free" in line(found, "device") and line(found, "next") == found[-1]
    assert line(found, "extras") and not any("dev" in text.split() for text in found)


def test_what_is_missing_and_what_brings_it(capsys, monkeypatch):
    version = metadata.version

    def without(name):
        if name in ("h5py", "onnx"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name in ("pyarrow", "argcomplete") else version(name)

    monkeypatch.setattr(metadata, "version", without)
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "solo_ext.data.h5", raising=False)
    monkeypatch.setattr(modules, "_without_dali", lambda: "is not installed; pip install 'solo-ext[dali]'")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 26, 0, 1 << 26))
    found = lines(capsys)
    assert line(found, "format h5") == "- format h5    missing: needs h5py: pip install 'solo-ext[h5]'"
    dali = [text for text in found if "format dali" in text]
    assert len(dali) == torch.cuda.is_available() and all("pip install 'solo-ext[dali]'" in text for text in dali)
    assert line(found, "extra h5").endswith("lacks h5py: pip install 'solo-ext[h5]'")
    assert "lacks onnx:" in line(found, "extra onnx") and "lacks pyarrow:" in line(found, "extra features")
    assert line(found, "packages").endswith("pip install 'argcomplete>=3.1'")
    assert line(found, "workers").startswith("- workers      64 MiB") and "--shm-size" in line(found, "workers")


@pytest.mark.parametrize(
    ("cuda", "program", "environment", "words"),
    [
        ("13.0", "nvidia-smi", {}, "PyTorch's CUDA 13.0 finds no GPU"),
        (None, "nvidia-smi", {}, "is for CPUs alone"),
        ("13.0", "nvidia-smi", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= hides every GPU"),
        ("13.0", "srun", {}, "this is no SLURM job, and has no GPU; srun --gpus=1 solo-ext doctor"),
        ("13.0", "srun", {"SLURM_JOB_ID": "1"}, "this SLURM job has no GPU; srun --gpus=1 solo-ext doctor"),
        (None, "srun", {}, "is for CPUs alone"),
    ],
)
def test_why_pytorch_finds_no_card(cuda, program, environment, words, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == program else None)
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, found, advice = doctor._device({"cpu": "X", "cores": 2, "gpus": [], "cuda": cuda})
    assert "no GPU" not in found and words in advice


def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "solo_ext", "doctor"], env=env, capture_output=True, text=True)
    [said] = done.stderr.splitlines()
    assert done.returncode == 2 and "torchvision::nms does not exist" in said and "reinstall" in said


def test_a_card_that_this_pytorch_cannot_use():
    """As one that is too old; an Apple GPU, on other machines, fails alike."""
    if torch.backends.mps.is_available():
        pytest.skip("there is one")
    _, found, advice = doctor._precisions(torch.device("mps"))
    assert found == "none works on the mps" and "mps" in advice.lower() and doctor.INSTALL in advice
