"""Devices and precision, on machines with and without GPUs."""

import re

import pytest
import torch
from conftest import ROOT
from tiny_runs import config

from solo_ext.errors import ConfigError
from solo_ext.training import trainer_config
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.trainer_config import TrainerConfig


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count: int):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


@pytest.mark.parametrize(
    "there, accelerator, devices, count",
    [
        (0, "auto", "auto", 1),
        (0, "auto", [0], 1),
        (0, "cpu", 2, 2),
        (0, "gpu", -1, 1),
        (3, "auto", "auto", 3),
        (3, "gpu", "-1", 3),
        (3, "cpu", "auto", 1),
        (3, "auto", "0,2", 2),
        (3, "auto", 2, 2),
    ],
)
def test_device_count(gpus, there, accelerator, devices, count):
    gpus(there)
    cfg = TrainerConfig(accelerator=accelerator, devices=devices)
    assert cfg.device_count == count
    on_gpu = accelerator != "cpu" and (there or accelerator == "gpu")
    assert cfg.trainer_devices == (devices if on_gpu else count)


@pytest.mark.parametrize(
    "there, overrides, words",
    [
        (0, ["accelerator=gpu"], "accelerator=cpu"),
        (0, ["accelerator=cuda"], "accelerator=cpu"),
        (0, ["accelerator=mps"], "accelerator=cpu"),
        (1, ["accelerator=gpu", "devices=4"], "asks for 4 GPUs, but there are 1"),
        (2, ["devices=[2]"], "asks for 3 GPUs, but there are 2"),
        (0, ["accelerator=cpu"], None),
        (0, ["devices=[0]"], None),
        (1, ["accelerator=gpu"], None),
        (2, ["devices='0,1'"], None),
        (2, ["accelerator=cpu", "devices=4"], None),
    ],
)
def test_hardware_is_asked_for_only_when_a_run_begins(gpus, there, overrides, words):
    gpus(there)
    cfg = resolve(compose(ROOT / "scripts/pretrain/cifar10", "byol", overrides))
    if words is None:
        cfg.check_hardware()
    else:
        with pytest.raises(ConfigError, match=re.escape(words)):
            cfg.check_hardware()


@pytest.mark.parametrize(
    "gpus, accelerator, devices, text",
    [
        (0, "auto", "auto", "cpu"),
        (0, "cpu", 2, "2 processes on the cpu"),
        (4, "cpu", 1, "cpu"),
        (4, "gpu", 1, "cuda:0 (H100)"),
        (4, "auto", [1, 3], "cuda:1,3 (H100)"),
        (2, "auto", "auto", "cuda:0,1 (H100)"),
    ],
)
def test_devices_are_named(monkeypatch, tmp_path, gpus, accelerator, devices, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    cfg = config(tmp_path, accelerator=accelerator, devices=devices)
    assert cfg.devices_text == text
    cfg.num_nodes = 2
    assert cfg.devices_text == f"{text}, 2 nodes"


@pytest.mark.parametrize(
    "requested, accelerator, bf16, expected",
    [
        ("16-mixed", "cpu", True, "bf16-mixed"),
        ("16-mixed", "cpu", False, "32"),
        (16, "cpu", True, "bf16-mixed"),
        ("bf16-mixed", "cpu", True, "bf16-mixed"),
        ("bf16-mixed", "cpu", False, "32"),
        ("32-true", "cpu", False, "32-true"),
        (32, "cpu", True, "32"),
        (16, "gpu", False, "16-mixed"),
        ("16-mixed", "gpu", False, "16-mixed"),
    ],
)
def test_pick_precision(monkeypatch, caplog, requested, accelerator, bf16, expected):
    monkeypatch.setattr(trainer_config, "cpu_has_bf16", lambda: bf16)
    assert TrainerConfig(precision=requested, accelerator=accelerator).pick_precision() == expected
    assert len(caplog.records) == (expected != {16: "16-mixed", 32: "32"}.get(requested, requested))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 2**32, "seed must be a whole number from 0 to 4294967295, not 4294967296"),
        ("val_check_interval", 0, "val_check_interval must be above 0, not 0"),
        ("val_check_interval", 0.0, "val_check_interval must be above 0, not 0.0"),
        ("log_every_n_steps", 0, "log_every_n_steps must be a whole number of at least 1, not 0"),
    ],
)
def test_numbers_that_lightning_or_numpy_cannot_take(tmp_path, key, value, expected):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **{key: value})
    assert str(error.value) == expected
    assert config(tmp_path, seed=2**32 - 1).seed == 4294967295
