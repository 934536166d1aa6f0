"""`solo-ext doctor` tries everything out, and names the command that brings what is missing."""

import shutil
import sys
from collections import namedtuple
from importlib import metadata

import pytest
import torch

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
    assert line(found, "extras") and not any("dev" in text.split() for text in found)


def test_what_is_missing_and_what_brings_it(capsys, monkeypatch):
    version = metadata.version

    def without(name):
        if name in ("h5py", "onnx"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "pyarrow" else version(name)

    monkeypatch.setattr(metadata, "version", without)
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "solo_ext.data.h5", raising=False)
    monkeypatch.setattr(modules, "_without_dali", lambda: "is not installed; pip install 'solo-ext[dali]'")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 26, 0, 1 << 26))
    found = lines(capsys)
    assert line(found, "format h5") == "- format h5    missing: needs h5py: pip install 'solo-ext[h5]'"
    assert line(found, "format dali").endswith(
        "NVIDIA DALI, which is not installed; pip install 'solo-ext[dali]', or use image_folder"
    )
    assert line(found, "extra h5").endswith("lacks h5py: pip install 'solo-ext[h5]'")
    assert "lacks onnx:" in line(found, "extra onnx") and "lacks pyarrow:" in line(found, "extra features")
    assert line(found, "workers").startswith("- workers      64 MiB") and "--shm-size" in line(found, "workers")


@pytest.mark.parametrize(("cuda", "words"), [("13.0", "PyTorch's CUDA 13.0 finds no GPU"), (None, "is for CPUs alone")])
def test_a_driver_whose_card_pytorch_does_not_find(cuda, words, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    about = {"cpu": "X", "cores": 2, "gpus": [], "cuda": cuda}
    _, found, advice = doctor._device(about)
    assert "no GPU" not in found and words in advice
