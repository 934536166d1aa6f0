"""`solo-ext with-solo-learn`: solo-learn's own scripts with our methods, and both sides' run folders in each other's.

What needs a checkout (SOLO_LEARN=<path>) runs its unchanged scripts; the rest a small one that is made up here.
"""

import functools
import json
import logging
import os
import re
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from conftest import ROOT, own_backbones
from frameworks import SOLO_FRAMEWORKS, spec_of
from lightning.pytorch.trainer.connectors import accelerator_connector
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.torch_version import TorchVersion
from torchmetrics import Metric

from solo_ext.compat import solo_learn as runner
from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.methods import METHODS
from solo_ext.networks import BackboneConfig, build_backbone
from solo_ext.runs.checkpoints import load_checkpoint, open_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import knn
from solo_ext.training.pretrain import pretrain
from solo_ext.training.trainer_config import TrainerConfig

ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


def changed_by_hand(monkeypatch, *attributes):
    """Has `monkeypatch` set these back at the end, whoever changes them."""
    for owner, name in attributes:
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def process(monkeypatch):
    """What running a script changes in this process is set back."""
    changed_by_hand(monkeypatch, (Metric, "__init__"), (LRScheduler, "load_state_dict"), (nn.Module, "to"))
    changed_by_hand(monkeypatch, (torch.Tensor, "to"), (torch.Tensor, "cuda"))
    changed_by_hand(monkeypatch, (accelerator_connector, "TorchSyncBatchNorm"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv(runner._RUN, "")
    monkeypatch.setattr(logging.getLogger("solo_ext"), "disabled", False)  # Hydra disables what it finds
    safe = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(safe)


# A made-up checkout.

NEW_METRIC = "class WeightedKNNClassifier:\n    pass\n"
OLD_METRIC = """
from torchmetrics import Metric


class WeightedKNNClassifier(Metric):
    def __init__(self):
        super().__init__(dist_sync_on_step=False, compute_on_step=False)

    def update(self, x):
        self.x = x

    def compute(self):
        raise AssertionError("computed at a step")
"""
# notes how it was started, and starts itself again as Lightning does
SCRIPT = """
import json, os, subprocess, sys
import __main__
from solo.methods import METHODS

shown = {"argv": sys.argv, "cwd": os.getcwd(), "name": __name__, "file": __file__, "methods": sorted(METHODS)}
with open("shown.json", "a") as file:
    print(json.dumps(shown), file=file)
if "again" in sys.argv and "AGAIN" not in os.environ:
    command = [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
    subprocess.run(command, env={**os.environ, "AGAIN": "1"}, check=True)
"""


@pytest.fixture
def checkout(tmp_path, process):
    """Makes a small checkout, with other files if given; its modules hide those of a real one during the test."""

    def make(files=()):
        texts = {
            "solo/__init__.py": "",
            "solo/methods/__init__.py": "METHODS = {}\n",
            "solo/methods/base.py": "import lightning.pytorch\n\n\nclass BaseMethod:\n    _BACKBONES = {}\n",
            "solo/utils/__init__.py": "",
            "solo/utils/knn.py": NEW_METRIC,
            **{f"solo/args/{name}.py": "def parse_cfg(cfg):\n    return cfg\n" for name in ("linear", "pretrain")},
            "main_knn.py": SCRIPT,
            "main_linear.py": SCRIPT,
        }
        folder = tmp_path / "solo-learn"
        for name, text in (texts | dict(files)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    def forget():
        names = [name for name in sys.modules if name.split(".")[0] == "solo"]
        return {name: sys.modules.pop(name) for name in names}

    real = forget()
    yield make
    forget()
    sys.modules.update(real)


def test_a_script_runs_as_if_by_itself_also_in_the_processes_that_lightning_starts(
    run, checkout, tmp_path, monkeypatch
):
    folder = checkout()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--config-path", "scripts/pretrain", "--help", "method=byol", "++new.key=[1,2]", "--k", "1", "-x", "again"]
    before = sys.argv, sys.modules["__main__"]
    status, _, err = run("with-solo-learn", folder, "main_linear.py", *words)
    assert (status, sys.argv, sys.modules["__main__"]) == (0, *before), err
    script = str(folder / "main_linear.py")
    expected = {
        "argv": [script, *words],
        "cwd": str(tmp_path),
        "name": "__main__",
        "file": script,
        "methods": sorted(METHODS),
    }
    assert [json.loads(line) for line in (tmp_path / "shown.json").read_text().splitlines()] == [expected] * 2


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({}, [], "the following arguments are required: PATH, SCRIPT"),
        ({}, ["solo-learn"], "the following arguments are required: SCRIPT"),
        ({}, ["nowhere", "main_knn.py"], "nowhere is not a checkout of solo-learn: it has no solo/methods/__init__.py"),
        ({}, ["solo-learn", "main_kn.py"], "has no 'main_kn.py'; did you mean 'main_knn.py'?"),
        ({}, ["solo-learn", "train"], "has no 'train' (one of main_knn.py, main_linear.py)"),
        ({}, ["solo-learn", "../main_knn.py"], "has no '../main_knn.py'; did you mean 'main_knn.py'?"),
        ({"solo/methods/base.py": "import pytorch_lightning\n"}, ["solo-learn", "main_knn.py"], "is older than"),
        ({"main_knn.py": "import umap\n"}, ["solo-learn", "main_knn.py"], "not installed: pip install umap-learn"),
        ({"solo/utils/knn.py": "import no.x\n"}, ["solo-learn", "main_knn.py"], "main_knn.py needs no, which is not"),
    ],
)
def test_a_mistake_is_one_sentence(run, checkout, monkeypatch, files, words, message):
    checkout(files)
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    status, out, err = run("with-solo-learn", *words)
    lines = [line for line in err.splitlines() if "repaired" not in line]
    assert status == 2 and not out and len(lines) == 1 and message in lines[0]


def test_what_the_script_itself_gets_wrong_stays_its_own(run, checkout):
    checkout({"main_knn.py": "import sys\nsys.exit(3)\n", "main_linear.py": "import solo.nothing\n"})
    assert run("with-solo-learn", "solo-learn", "main_knn.py")[0] == 3
    with pytest.raises(ModuleNotFoundError, match="solo"):
        run("with-solo-learn", "solo-learn", "main_linear.py")


def test_repairs_are_absent_where_nothing_is_broken(run, checkout, monkeypatch):
    checkout()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = Metric.__init__, LRScheduler.load_state_dict, torch.Tensor.to
    status, _, err = run("with-solo-learn", "solo-learn", "main_knn.py")
    assert status == 0 and "repaired" not in err
    assert (Metric.__init__, LRScheduler.load_state_dict, torch.Tensor.to) == before


@ON_THE_CPU
def test_repairs_are_named_and_made_where_they_are_needed(run, checkout):
    checkout({"solo/utils/knn.py": OLD_METRIC})
    strict = torch.__version__ >= (2, 6)
    status, _, err = run("with-solo-learn", "solo-learn", "main_knn.py")
    named = [line.split("solo-learn: ")[1].split(" (")[0] for line in err.splitlines() if "repaired" in line]
    assert status == 0 and named == ["compute_on_step", *["checkpoint objects"][:strict], "no GPU"]
    from solo.utils.knn import WeightedKNNClassifier

    metric = WeightedKNNClassifier()
    metric(torch.ones(2))  # stores, and does not compute
    assert metric.x.tolist() == [1, 1]
    assert torch.ones(1).cuda(non_blocking=True).device == nn.Linear(1, 1).to("cuda:0").weight.device
    assert torch.ones(1).to("cuda:0", torch.float64, non_blocking=True).dtype == torch.float64
    assert torch.ones(1).to(device=torch.device("cuda", 0)).device.type == "cpu"


READING = """
import json
from omegaconf import OmegaConf
from solo.args.pretrain import parse_cfg

print(json.dumps(OmegaConf.to_container(parse_cfg(OmegaConf.load("asked.yaml")))))
"""
FOR_GPUS = {
    "accelerator": "gpu",
    "devices": [0],
    "strategy": "ddp",
    "precision": "16-mixed",
    "sync_batchnorm": True,
    "data": {"format": "dali"},
    "wandb": {"enabled": True, "offline": False},
}


@ON_THE_CPU
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"devices": 1, "strategy": "auto", "sync_batchnorm": False}),
        ({"devices": [0, 1]}, {"devices": 2}),
        ({"accelerator": "cpu", "devices": 1, "data": {"format": "h5"}, "wandb": {"enabled": False}}, {}),
    ],
)
def test_keys_for_gpus_become_those_of_this_machine(run, checkout, tmp_path, monkeypatch, asked, expected):
    checkout({"main_pretrain.py": READING})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    asked = {**FOR_GPUS, **asked}
    OmegaConf.save(asked, tmp_path / "asked.yaml")
    status, out, err = run("with-solo-learn", "solo-learn", "main_pretrain.py")
    if expected:
        precision = TrainerConfig(accelerator="cpu", precision="16-mixed").pick_precision(warn=False)
        expected |= {"accelerator": "cpu", "precision": precision, "data": {"format": "image_folder"}}
        expected |= {"wandb": {"enabled": True, "offline": True}}
    assert status == 0 and json.loads(out) == {**asked, **expected}
    assert ("accelerator=cpu, devices=" in err and "wandb.offline=True" in err) == bool(expected)


@pytest.mark.parametrize("key", ["WANDB_API_KEY", "NETRC", None])
def test_only_where_nobody_has_logged_in_wandb_stays_offline(key, tmp_path, monkeypatch):
    host = wandb.setup().settings.base_url.removeprefix("https://")
    (tmp_path / "NETRC").write_text(f"machine {host} login user password {'0' * 40}\n")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if key:
        monkeypatch.setenv(key, str(tmp_path / key))
    wandb.teardown()
    cfg = OmegaConf.create({**FOR_GPUS, "accelerator": "cpu"})
    assert runner._here(cfg).get("wandb.offline", False) == (key is None)
    wandb.teardown()


# A real checkout.


@pytest.fixture
def solo(solo_learn, process, tmp_path, monkeypatch):
    """Runs a script of the real checkout, in this process, in a folder with images; returns what it printed."""
    from solo.args import linear, pretrain
    from solo.methods import METHODS as registry
    from solo.methods.base import BaseMethod
    from solo.utils.knn import WeightedKNNClassifier

    changed_by_hand(monkeypatch, (WeightedKNNClassifier, "forward"), (linear, "parse_cfg"), (pretrain, "parse_cfg"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 3)):
        for shade, label in enumerate("abcdef"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 200, (40, 40, 3)) + 10 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / split / label / f"{i}.png")
    tables = [(table, dict(table)) for table in (registry, BaseMethod._BACKBONES)]
    yield functools.partial(runner.run_script, solo_learn)
    for table, before in tables:
        table.clear()
        table.update(before)


DATA = {"dataset": "custom", "train_path": "images/train", "val_path": "images/val", "num_workers": 0}
ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "seed": 0}
AUGMENTATION = {"rrc": {"enabled": True}, "crop_size": 32, "num_crops": 2}


def our_run(method, backbone="resnet10_w16", **changes):
    """A run folder of ours: one step on the images."""
    values = {
        "name": "tiny",
        "method": method,
        "backbone": {"name": backbone},
        "method_kwargs": {"proj_hidden_dim": 16, "proj_output_dim": 8, **spec_of(method).kwargs},
        "data": DATA,
        "augmentations": [AUGMENTATION],
        "optimizer": {"name": "sgd", "batch_size": 24, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 1e-4},
        "scheduler": {"name": "warmup_cosine"},
        "checkpoint": {"enabled": True, "dir": "ours"},
        **ONE_EPOCH,
        "enable_progress_bar": False,
        **changes,
    }
    return pretrain(resolve(OmegaConf.create(values), "pretrain"))


def overrides(**changes):
    """Hydra's words for a short run of solo-learn's scripts; `__` stands for the dot."""
    values = {
        **{f"data__{key}": value for key, value in DATA.items()},
        "data__format": "image_folder",
        "optimizer__batch_size": 8,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": "'1'",
        "strategy": "auto",
        "precision": 32,
        "wandb__enabled": False,
        "sync_batchnorm": False,
        "auto_resume__enabled": False,
        "performance__disable_channel_last": True,  # the same numbers to the last bit
        **changes,
    }
    return [f"++{key.replace('__', '.')}={value}" for key, value in values.items()]


def pretraining(method, backbone__name="resnet10_w16", **changes):
    """The command line of main_pretrain.py with solo-learn's YAML for custom data."""
    kwargs = {"proj_hidden_dim": 16, **spec_of(method).kwargs}
    crops = {f"augmentations__{i}__crop_size": 32 for i in range(2)}
    kwargs = {f"method_kwargs__{key}": value for key, value in kwargs.items()}
    yaml = ["--config-path", "scripts/pretrain/custom", "--config-name", "byol.yaml"]
    return [*yaml, *overrides(method=method, backbone__name=backbone__name, **kwargs, **crops, **changes)]


def linear_evaluation(checkpoint, **changes):
    yaml = ["--config-path", "scripts/linear/imagenet-100", "--config-name", "byol.yaml"]
    return [*yaml, *overrides(pretrained_feature_extractor=f"'{checkpoint}'", **changes)]


def images_and(folder):
    """The command line of main_umap.py, and the beginning of main_knn.py's."""
    data = ["--dataset", "custom", "--train_data_path", "images/train", "--val_data_path", "images/val"]
    return [*data, "--batch_size", "6", "--num_workers", "0", "--pretrained_checkpoint_dir", str(folder)]


def same_features(theirs, ours, size=64):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(theirs.eval()(x), ours.eval()(x))


def fit_and_score(fit, trainer, *args, **kwargs):
    fit(trainer, *args, **kwargs)
    return trainer.callback_metrics


@pytest.fixture
def linear_backbone(solo, monkeypatch):
    """The backbone that main_linear.py reads from a checkpoint, up to where its training would begin."""

    def read(checkpoint, **changes):
        models = []
        with monkeypatch.context() as patched:
            patched.setattr(pl.Trainer, "fit", lambda self, model, *args, **kwargs: models.append(model))
            solo("main_linear.py", linear_evaluation(checkpoint, **changes))
        return models[0].backbone

    return read


@pytest.mark.parametrize("method", METHODS)
def test_our_run_folders_are_read_whole(solo, linear_backbone, method):
    """As main_knn.py and main_umap.py read them, and main_linear.py: nothing is missing, and the features are ours."""
    from solo.methods import METHODS as registry

    run = our_run(method)
    ours = load_encoder(run.dir)[0]
    theirs = linear_backbone(run.checkpoint, backbone__name="resnet10_w16", pretrain_method=method)
    assert same_features(theirs, ours)

    assert [name for name in os.listdir(run.dir) if name.endswith(".ckpt")] == [run.checkpoint.name]  # they take any
    cfg = OmegaConf.create(json.loads((run.dir / "args.json").read_text()))
    theirs = registry[method].load_from_checkpoint(run.checkpoint, strict=False, cfg=cfg)
    assert isinstance(theirs, METHODS[method]) == (method not in SOLO_FRAMEWORKS)
    saved, state = load_checkpoint(run.checkpoint)["state_dict"], theirs.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(x, saved[name]) for name, x in state.items())
    assert same_features(theirs.backbone, ours)
    assert theirs(torch.zeros(2, 3, 64, 64))["z"].shape[0] == 2


@ON_THE_CPU
@pytest.mark.parametrize(("method", "backbone"), [("byol", "resnet18"), ("res_mocov3", "resnet10_w16")])
def test_its_knn_of_our_run_is_ours(solo, method, backbone, capsys):
    folder = our_run(method, backbone).dir
    encoder = {"pretrained_feature_extractor": str(folder), "accelerator": "cpu", "data": DATA}
    options = {"k": [1, 5], "distance_func": ["euclidean", "cosine"], "T": [0.1]}
    ours = {(row["distance"], row["k"]): row for row in knn(resolve({**encoder, "knn_eval": options}, "knn"))}
    capsys.readouterr()
    options = ["--k", "1", "5", "--temperature", "0.1", "--feature_type", "backbone", "projector"]
    solo("main_knn.py", [*images_and(folder), *options, "--distance_function", "euclidean", "cosine"])
    printed = capsys.readouterr().out.split("### PROJECTOR")
    rows = re.findall(r"distance_fx=(\w+), k=(\d+), .*\n.*acc@1=([\d.]+), acc@5=([\d.]+)", printed[0])
    assert len(rows) == 4
    for distance, k, *scores in rows:
        row = ours[distance, int(k)]
        assert (row["acc1"], row["acc5"]) == pytest.approx(tuple(map(float, scores)))


@ON_THE_CPU
def test_its_umap_of_our_run(solo, tmp_path):
    for name in ("pandas", "seaborn", "umap"):
        pytest.importorskip(name)
    solo("main_umap.py", images_and(our_run("projector_ema_simsiam").dir))
    assert {file.name for file in tmp_path.glob("*.pdf")} == {"im100_train_umap.pdf", "im100_val_umap.pdf"}


BACKBONES = [
    ("resnet10_w16", "byol"),
    ("resnet34", "projector_ema_simclr"),
    ("timm/mobilenetv3_small_050", "byol"),
    ("vit_tiny", "byol"),
    ("vit_tiny", "mocov3"),
    ("vit_tiny", "res_moco"),  # by its own table, solo-learn would take a ViT with other heads
    ("vit_tiny", "projector_ema_mocov3"),
]


@pytest.mark.parametrize(("name", "method"), BACKBONES)
def test_our_backbones_are_read_by_its_linear_evaluation(linear_backbone, tmp_path, name, method):
    ours = build_backbone(BackboneConfig(name), own=own_backbones(method))
    torch.save({"state_dict": {f"backbone.{key}": x for key, x in ours.state_dict().items()}}, tmp_path / "x.ckpt")
    theirs = linear_backbone(tmp_path / "x.ckpt", backbone__name=name, pretrain_method=method)
    assert same_features(theirs, ours, 224)


@pytest.mark.parametrize(
    "method", ["byol", "simsiam", "res_mocov3", "projector_ema_byol", "projector_ema_dino", "res_ressl"]
)
def test_its_script_trains_and_we_read_what_it_wrote(solo, linear_backbone, method, tmp_path, monkeypatch):
    name = "resnet18" if method == "byol" else "resnet10_w16"
    scores, fit = {}, pl.Trainer.fit
    with monkeypatch.context() as patched:
        patched.setattr(
            pl.Trainer,
            "fit",
            lambda trainer, *args, **kwargs: scores.update(fit_and_score(fit, trainer, *args, **kwargs)),
        )
        solo("main_pretrain.py", pretraining(method, name, knn_eval__enabled=method.endswith("byol")))
    assert ("val_knn_acc1" in scores) == method.endswith("byol")
    assert scores.get("val_knn_acc1", 0) >= 0  # -1 if nothing had been stored
    [checkpoint] = (tmp_path / "trained_models" / method).rglob("*.ckpt")
    saved = open_checkpoint(checkpoint).state
    ours, config = load_encoder(checkpoint.parent)
    assert config["method"] == method
    METHODS[method](OmegaConf.create(config)).load_state_dict(saved, strict=True)
    assert same_features(linear_backbone(checkpoint, pretrain_method=method, backbone__name=name), ours)
    scores = knn(resolve({**run_values(checkpoint.parent, "knn"), **ONE_EPOCH, "knn_eval": {"k": [1]}}, "knn"))
    assert all(0 <= row["acc1"] <= 100 for row in scores)


def test_its_knn_metric_counts_as_ours(solo):
    from solo.utils.knn import WeightedKNNClassifier

    with pytest.raises(ValueError, match="compute_on_step"):
        WeightedKNNClassifier()
    assert "compute_on_step" in runner.apply_repairs("main_pretrain.py")
    assert "compute_on_step" not in runner.apply_repairs("main_pretrain.py")  # nothing is broken any more
    metric = WeightedKNNClassifier(k=5)
    train, test = torch.randn(40, 8), torch.randn(20, 8)
    labels = torch.arange(40) % 4, torch.arange(20) % 4
    metric(train_features=train, train_targets=labels[0])
    metric(test_features=test, test_targets=labels[1])
    ours = knn_accuracy(train, labels[0], test, labels[1], 5, "cosine")[5]
    assert metric.compute() == pytest.approx((ours["acc1"], ours["acc5"]))


def test_its_simsiam_resumes_where_it_was(solo, tmp_path, monkeypatch):
    options = {"max_epochs": 2, "checkpoint__keep_prev": True, "scheduler__warmup_epochs": 1}
    solo("main_pretrain.py", pretraining("simsiam", **options))
    first, last = sorted((tmp_path / "trained_models" / "simsiam").rglob("*.ckpt"))
    command = pretraining("simsiam", **options, resume_from_checkpoint=f"'{first}'", checkpoint__dir="again")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(runner, "REPAIRS", ())
        torch.serialization.clear_safe_globals()
        solo("main_pretrain.py", command)
    solo("main_pretrain.py", command)
    [resumed] = (tmp_path / "again" / "simsiam").rglob("*ep=1.ckpt")
    groups = [load_checkpoint(file)["optimizer_states"][0]["param_groups"] for file in (last, resumed)]
    assert [g["lr"] for g in groups[0]] == pytest.approx([g["lr"] for g in groups[1]])


def test_two_processes_train_our_method(solo, solo_learn, tmp_path):
    """Lightning starts the second one; each sees half of the images. Without a GPU, the YAML asks for two."""
    words = pretraining("projector_ema_byol", devices="'2'", strategy="ddp", optimizer__batch_size=4)
    if not torch.cuda.is_available():
        keys = tuple(f"++{key}" for key in (*FOR_GPUS.keys() - {"data"}, "data.format"))
        words = [word for word in words if not word.startswith(keys)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "solo_ext", "with-solo-learn", str(solo_learn), "main_pretrain.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("accelerator=cpu, devices=2" in done.stderr) != torch.cuda.is_available()
    [checkpoint] = (tmp_path / "trained_models" / "projector_ema_byol").rglob("*.ckpt")
    assert load_checkpoint(checkpoint)["global_step"] == 24 // (2 * 4)
    load_encoder(checkpoint.parent)
