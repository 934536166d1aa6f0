"""Run folders as solo-learn's releases wrote them: older names, flat options, and objects beside the tensors."""

import argparse
import functools
import json
import sys
from pathlib import PurePosixPath
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from torch import nn

from solo_ext.errors import CheckpointError
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.layouts import Placeholder
from solo_ext.training.config import run_values


def resnet(small):
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    if small:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        network.maxpool = nn.Identity()
    return network


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)


COMMON = {"name": None, "lr": 0.3, "optimizer": "sgd", "lars": True, "max_epochs": 400}  # of many more
CIFAR = {"dataset": "cifar10", "data_dir": "datasets", "train_dir": None, "val_dir": None, "size": [224]}
CUSTOM = {"dataset": "custom", "mean": [0.5] * 3, "std": [0.2] * 3}
FOLDERS = {"data_dir": "data", "train_dir": "a", "val_dir": "b"}
RELEASES = {
    "0.9": (
        functools.partial(resnet, True),
        {"method": "byol", "encoder": "resnet18", "cifar": True, "zero_init_residual": False, **CIFAR},
        {
            "dataset": "cifar10",
            "train_path": "datasets",
            "val_path": "datasets",
            "augmentations": {"crop_size": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.243, 0.261]},
        },
    ),
    "1.0.2": (
        functools.partial(resnet, False),
        {
            "method": "simclr",
            "encoder": "resnet18",
            "backbone_args": {"cifar": False, "zero_init_residual": True},
            **CUSTOM,
            **FOLDERS,
            "size": [96, 96],
        },
        {
            "dataset": "custom",
            "train_path": "data/a",
            "val_path": "data/b",
            "augmentations": {"crop_size": 96, "mean": [0.5] * 3, "std": [0.2] * 3},
        },
    ),
    "1.0.5": (
        vit,
        {
            "method": "mocov3",  # which had no ViT of its own: three heads, not twelve
            "backbone": "vit_tiny",
            "backbone_args": {"cifar": False, "img_size": 32, "patch_size": 8},
            "dataset": "imagenet100",
            "train_data_path": "a",
            "val_data_path": "b",
            "crop_size": [32],
        },
        {
            "dataset": "imagenet100",
            "train_path": "a",
            "val_path": "b",
            "augmentations": {"crop_size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        },
    ),
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("teacher", [False, True])
def test_a_run_folder_of_an_older_release(tmp_path, release, teacher):
    build, args, data = RELEASES[release]
    part = "encoder" if "encoder" in args else "backbone"
    networks = {part: build().eval(), f"momentum_{part}": build().eval()}
    state = {f"{name}.{key}": x for name, network in networks.items() for key, x in network.state_dict().items()}
    torch.save({"state_dict": state | {"classifier.weight": torch.zeros(10, 4)}}, tmp_path / "x-ep=3.ckpt")
    (tmp_path / "args.json").write_text(json.dumps({**COMMON, **args}))

    ours, config = load_encoder(tmp_path, teacher=teacher)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), networks[f"momentum_{part}" if teacher else part](images))
    assert config["method"] == args["method"]
    values = run_values(tmp_path, "knn")
    # what a file of somebody else's names is read, and nothing is fetched to there
    assert values["data"] == data | {"download": False} and values["name"] == f"{args['method']}-knn"


def test_a_network_that_we_lack_is_named(tmp_path):
    torch.save({"state_dict": {"encoder.x": torch.zeros(1)}}, tmp_path / "x-ep=3.ckpt")
    (tmp_path / "args.json").write_text(json.dumps({"method": "byol", "encoder": "swin_tiny", "dataset": "custom"}))
    with pytest.raises(ValueError, match="unknown backbone 'swin_tiny'"):
        load_encoder(tmp_path)


@pytest.fixture
def solos_function(monkeypatch):
    """`solo.methods.base.static_lr`, by name; it must not be called."""

    def static_lr(*_args, **_kwargs):
        raise AssertionError("called")

    static_lr.__module__, static_lr.__qualname__ = "solo.methods.base", "static_lr"
    for name in ("solo", "solo.methods", "solo.methods.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["solo.methods.base"].static_lr = static_lr
    return static_lr


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_objects_beside_the_tensors_are_passed_over(tmp_path, solos_function, optimizer):
    """SimSiam's scheduler, with which its optimizer was saved, and AdamW's betas, with the whole configuration."""
    network = nn.Linear(2, 3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer(network.parameters(), lr=0.1), [1, 2])
    network(torch.ones(1, 2)).sum().backward()
    scheduler.optimizer.step()
    scheduler.get_lr = functools.partial(solos_function, get_lr=scheduler.get_lr, lrs_to_replace=[0.1])
    cfg = OmegaConf.create({"optimizer": {"kwargs": {"betas": [0.9, 0.95]}}, "data": {"x": None, "y": "${optimizer}"}})
    checkpoint = {
        "state_dict": network.state_dict(),
        "lr_schedulers": [scheduler.state_dict()],
        "optimizer_states": [{"param_groups": [{"lr": 0.1, "betas": cfg.optimizer.kwargs.betas}]}],
    }
    torch.save(checkpoint, tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in loaded["state_dict"].items())
    assert loaded["optimizer_states"][0]["param_groups"][0]["betas"] == [0.9, 0.95]
    assert loaded["lr_schedulers"][0]["last_epoch"] == 0
    assert isinstance(loaded["lr_schedulers"][0]["get_lr"], Placeholder)


class Reached:
    def __reduce__(self):
        return getattr, (argparse.ArgumentParser, "error")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (PurePosixPath("x"), "PurePosixPath"),
        (functools.partial(print, "called"), "print"),
        (Reached(), "ArgumentParser"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, content, named):
    torch.save({"state_dict": {}, "hyper_parameters": content}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=f"is not loaded: it holds code or objects .*{named}"):
        load_checkpoint(tmp_path / "x.ckpt")
