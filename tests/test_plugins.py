"""Methods, datasets, backbones, monitors and callbacks from a module of the user's own."""

import json
import os
import subprocess
import sys

import pytest

from solo_ext import plugins
from solo_ext.errors import ConfigError

MODULE = """
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
from torch import nn

from solo_ext.data.datasets import DATASETS, DatasetInfo
from solo_ext.data.images import ArrayImages, ImageSet
from solo_ext.methods import METHODS
from solo_ext.methods.byol import BYOL
from solo_ext.networks import BACKBONES, FAMILIES, backbone_stages
from solo_ext.schema import Config
from solo_ext.text import Metric
from solo_ext.training.callbacks import MonitorCallback


class HalfBYOL(BYOL):
    teacher_stages = ["block4", "projector"]


class Net(nn.Sequential):
    num_features = 8

    def __init__(self, width: int = 4):
        first = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU())
        super().__init__(first, nn.Sequential(nn.Conv2d(width, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def images(data, split):
    numbers = np.random.default_rng(0)
    return ImageSet(ArrayImages(numbers.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)), np.arange(40) % 4)


@dataclass
class NormConfig(Config, section="feature_norm"):
    enabled: bool = False
    scale: float = 1.0


class FeatureNorm(MonitorCallback):
    key = "feature_norm"
    Config = NormConfig
    metrics = (Metric("feature_norm", "Norm of the classifier", "norm", "{:.1f}", progress=True),)

    def __init__(self, cfg):
        self.scale = cfg.scale

    def on_train_epoch_end(self, trainer, module):
        module.log("feature_norm", self.scale * module.classifier.weight.norm())


class Shout(pl.Callback):
    def __init__(self, word):
        self.word = word

    def on_train_end(self, trainer, module):
        print(self.word, type(module).__name__)


METHODS["half_byol"] = HalfBYOL
BACKBONES["net"] = Net
FAMILIES.append(
    lambda name, net: backbone_stages(name, {"conv1": ["0"], "block4": ["1"]}) if isinstance(net, Net) else []
)
DATASETS["noise"] = DatasetInfo(4, (0.5,) * 3, (0.25,) * 3, images, image_size=16, train_size=40)
"""
YAML = """
name: mine
method: half_byol
method_kwargs: {proj_hidden_dim: 8, proj_output_dim: 4, pred_hidden_dim: 8}
backbone: {name: net, kwargs: {width: 6}}
data: {dataset: noise, num_workers: 0}
augmentations: [{crop_size: 16, num_crops: 2}]
optimizer: {name: sgd, batch_size: 10, lr: 0.1}
feature_norm: {enabled: true, scale: 10}
callbacks: {my_module.Shout: {word: heard}}
max_epochs: 1
accelerator: cpu
"""


def solo_ext(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "solo_ext", *words], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(YAML)
    return tmp_path


@pytest.mark.slow
def test_a_run_of_what_a_module_of_ones_own_registers(mine):
    status, out, err = solo_ext(mine, "--import", "my_module", "pretrain", "mine.yaml", "checkpoint.enabled=True")
    assert status == 0, err
    assert "heard HalfBYOL" in out
    [args] = mine.glob("trained_models/half_byol/*/args.json")
    values = json.loads(args.read_text())
    assert values["momentum"]["stages"] == ["block4", "projector"]
    assert values["feature_norm"] == {"enabled": True, "scale": 10.0}
    assert values["callbacks"] == {"my_module.Shout": {"word": "heard"}}
    header, *rows = args.with_name("metrics.csv").read_text().splitlines()
    assert "feature_norm" in header.split(",") and len(rows) >= 1

    status, out, err = solo_ext(mine, "knn", "--import=my_module", "--run", str(args.parent), "--k", "1")
    assert status == 0 and "acc@1" in out, err


def test_a_monitor_brings_lightning_only_when_it_is_built():
    code = (
        "import sys; from solo_ext.training.callbacks import MONITORS; print('lightning' in sys.modules)\n"
        "made = [cls.make(cls.Config(), None, None) for cls in MONITORS.values() if cls.key != 'check']\n"
        "import lightning.pytorch as pl; print([isinstance(monitor, pl.Callback) for monitor in made if monitor])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["False", "[True, True, True]"], done.stderr


WRONG = [  # module, what follows the YAML, message
    ("my_modul", "", "--import my_modul: it cannot be imported: No module named"),
    (None, "--import", "--import needs the name of a module"),
    (None, "", "unknown key 'feature_norm'"),
    ("my_module", "feature_norm.scal=1", "did you mean 'feature_norm.scale'"),
    ("my_module", "callbacks={my_module.Shot:{}}", "callbacks.my_module.Shot"),
]


@pytest.mark.parametrize(("module", "word", "message"), WRONG)
def test_what_is_wrong_with_it_is_one_sentence(mine, module, word, message):
    before = ["--import", module] if module else []
    status, _, err = solo_ext(mine, *before, "pretrain", "mine.yaml", *([word] if word else []))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (mine / "trained_models").exists()


def test_modules_are_noted_for_child_processes(monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, "one")
    assert plugins.take(["pretrain", "--import", "two", "x.yaml", "--import=one"]) == ["pretrain", "x.yaml"]
    assert os.environ[plugins.VARIABLE] == "one,two"
    with pytest.raises(ConfigError, match="needs the name"):
        plugins.take(["--import", "--cfg"])
