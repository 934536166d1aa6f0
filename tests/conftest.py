"""Small configurations, networks and runs that the tests share."""

import dataclasses
import os
import random
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from frameworks import spec_of
from hub_server import hub  # noqa: F401
from omegaconf import OmegaConf
from tiny_runs import whole  # noqa: F401
from trials import pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401

from solo_ext.cli import main as cli
from solo_ext.methods import METHODS
from solo_ext.schema import plain

ROOT = Path(__file__).parents[1]  # of the repository
SOLO_LEARN = os.environ.get("SOLO_LEARN")


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _seeded_module():
    """The fixtures of a module draw the same numbers whatever ran before."""
    seed()


@pytest.fixture(autouse=True)
def _seeded():
    """So does each test."""
    seed()


@pytest.fixture(scope="session")
def solo_learn():
    """The path of a solo-learn checkout, importable as `solo`; skips where SOLO_LEARN does not name one."""
    if not SOLO_LEARN:
        pytest.skip("set SOLO_LEARN=<path of a solo-learn checkout> to compare with it")
    sys.path.insert(0, SOLO_LEARN)
    yield Path(SOLO_LEARN)
    sys.path.remove(SOLO_LEARN)


def pytest_collection_modifyitems(items):
    for item in items:
        if "solo_learn" in item.fixturenames:
            item.add_marker("solo_learn")


def method_config(method: str, **changes):
    """What a method class is built from, with solo-learn's keys; `changes` are dotted keys with `__` for the dot."""
    cfg = OmegaConf.create(
        {
            "name": "tiny",
            "method": method,
            "backbone": {"name": "resnet18", "kwargs": {}},
            "method_kwargs": {"proj_hidden_dim": 16, "proj_output_dim": 8, **spec_of(method).kwargs},
            "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": False},
            "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
            "optimizer": {
                "name": "sgd",
                "batch_size": 8,
                "lr": 0.05,
                "classifier_lr": 0.1,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
            "max_epochs": 2,
            "accumulate_grad_batches": 1,
            "performance": {"disable_channel_last": True},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def own_kwargs(method: str, **kwargs):
    """Of `kwargs`, those that the method has, as changes of `method_config`."""
    names = {field.name for field in dataclasses.fields(METHODS[method].Kwargs)}
    return {f"method_kwargs__{name}": value for name, value in kwargs.items() if name in names}


def value_at(cfg, key: str):
    """The value of a full key of a resolved configuration; None if it has no such key."""
    node = plain(cfg)
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, list) else (node or {}).get(name)
    return node


def own_backbones(method: str | None):
    """What `build_backbone` takes for a method by that name."""
    return METHODS[method].backbones if method else None


def tiny_config(method: str, **changes):
    return method_config(method, **{"backbone__name": "resnet10_w16", **changes})


def build(method: str = "byol", seed: int = 0, **changes):
    """A method on the tiny backbone, initialised with `seed`."""
    torch.manual_seed(seed)
    return METHODS[method](tiny_config(method, **changes))


def random_batches(steps: int, batch: int = 8, size: int = 16, views: int = 2, seed: int = 0, dtype=torch.float32):
    """Batches of the contract `(indexes, views, targets)` of random images."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.arange(batch),
            [torch.randn(batch, 3, size, size, generator=generator, dtype=dtype) for _ in range(views)],
            torch.randint(0, 10, (batch,), generator=generator),
        )
        for _ in range(steps)
    ]


def fit(model, batches, max_epochs: int = 1, callbacks=(), val=None, **trainer):
    """Trains `model` on ready-made batches in full precision on the CPU."""

    def loader(batches):
        return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    pl_trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"devices": 1, **trainer},
    )
    pl_trainer.fit(model, loader(batches), val and loader(val))
    return pl_trainer


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line in the temporary folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run
