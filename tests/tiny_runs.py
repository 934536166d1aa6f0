"""Pre-trainings of seconds on bundled images, whole and interrupted."""

import csv
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

CANARY = "canary0123" * 4  # a secret
AUGMENTATION = {"rrc": {"enabled": True}, "horizontal_flip": {"prob": 0.5}, "crop_size": 12, "num_crops": 2}


def config(folder, kind="pretrain", **changes):
    """A resolved configuration of 3 epochs of 3 steps on 50 bundled images; `__` in a key stands for the dot."""
    cfg = OmegaConf.create(
        {
            "name": "tiny",
            "backbone": {"name": "resnet10_w16", "kwargs": {}},
            "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01, "num_workers": 0},
            "optimizer": {"name": "sgd", "batch_size": 16, "lr": 0.5, "classifier_lr": 0.1},
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
            "checkpoint": {"enabled": True, "dir": str(folder)},
            "auto_resume": {"enabled": True},
            "performance": {"disable_channel_last": True},
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "limit_val_batches": 1,
            "log_every_n_steps": 2,
        }
    )
    if kind == "pretrain":
        small = {"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8}
        cfg = OmegaConf.merge({"method": "byol", "method_kwargs": small, "augmentations": [AUGMENTATION]}, cfg)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return resolve(cfg, kind)


forks = multiprocessing.get_context("forkserver")  # of a process without threads, which a fork would not survive
# once, not once per process
forks.set_forkserver_preload([f"solo_ext.training.{name}" for name in ("pretrain", "trainer", "sync_bn")])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def ended_by(function, *args):
    """The signal that ended a process of `function`."""
    child = forks.Process(target=function, args=args)
    child.start()
    child.join()
    return -child.exitcode


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return pretrain(config(tmp_path_factory.mktemp("whole"), checkpoint__keep_prev=True))


def crash():
    raise ZeroDivisionError


def interrupted(cfg, monkeypatch, step=4, how=crash):
    """The folder of a run of `cfg` that `how` ended after optimizer step number `step`, and what was raised."""
    original = Throughput.on_train_batch_end

    def hook(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == step:
            how()

    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_train_batch_end", hook)
        with pytest.raises((SystemExit, ZeroDivisionError)) as error:
            pretrain(cfg)
    [folder] = (Path(cfg.checkpoint.dir) / cfg.method).iterdir()
    return folder, error.value
