"""Checkpoints, resuming, loggers and the run assembly, against the faults that they are there for."""

import csv
import hashlib
import json
import math
import os
import pickle
import pty
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from conftest import build, random_batches, tiny_config
from omegaconf import OmegaConf
from torch import nn

from solo_ext.errors import CheckpointError, ConfigError, SoloExtError
from solo_ext.files import read_json
from solo_ext.methods import METHODS
from solo_ext.networks import build_backbone
from solo_ext.runs.checkpoints import CheckpointConfig, find_checkpoint, load_checkpoint, save_checkpoint
from solo_ext.runs.comparison import differences
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.environment import environment
from solo_ext.runs.lock import RunLock
from solo_ext.runs.resume import find_resumable
from solo_ext.runs.run import RECORDS
from solo_ext.training import hardware
from solo_ext.training.callbacks.throughput import Throughput
from solo_ext.training.config import resolve
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.hardware import devices_text
from solo_ext.training.loggers import CSVMetrics, reachable
from solo_ext.training.pretrain import pretrain
from solo_ext.training.safety import NonFiniteError, check_finite
from solo_ext.training.start import is_first
from solo_ext.training.trainer_config import TensorboardConfig, TrainerConfig

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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Checkpoint files.


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny-ab-ep=3.ckpt"
    save_checkpoint({"epoch": 3, "global_step": 12, "state_dict": {"w": torch.arange(1000.0)}}, path)
    return path


def test_checkpoint_round_trip_and_record(saved):
    assert torch.equal(load_checkpoint(saved)["state_dict"]["w"], torch.arange(1000.0))
    record = json.loads((saved.parent / RECORDS).read_text())[saved.name]
    assert (record["epoch"], record["step"], record["size"]) == (3, 12, saved.stat().st_size)
    assert names(saved.parent) == [RECORDS, saved.name]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_checkpoint_is_refused(saved, keep, recorded):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    if not recorded:
        (saved.parent / RECORDS).unlink()
    with pytest.raises(CheckpointError, match=saved.name):
        load_checkpoint(saved)


def test_any_flipped_bit_is_found(saved):
    content = saved.read_bytes()
    for position in range(0, len(content), len(content) // 20):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(saved)


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, write):
    path, sentinel = tmp_path / "evil.ckpt", tmp_path / "executed"
    write({"state_dict": {}, "hyper_parameters": Malicious(sentinel)}, path)
    with pytest.raises(CheckpointError, match=r"code or objects \(posix.mkdir\)|not a checkpoint"):
        load_checkpoint(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!doctype html><html>404</html>", "web page"),
        (b"", "empty"),
        (b"hello", "not a checkpoint"),
        (b"PK\3\4zip", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.ckpt")


def test_missing_checkpoint_names_the_nearest(saved):
    with pytest.raises(CheckpointError, match=r"ep=4.ckpt does not exist; did you mean 'tiny-ab-ep=3.ckpt'"):
        find_checkpoint(saved.with_name("tiny-ab-ep=4.ckpt"))


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved):
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for path in (saved, saved.with_name("tiny-ab-ep=4.ckpt")):
            with pytest.raises(CheckpointError, match=f"{path.name} cannot be written: File too large"):
                save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before and names(saved.parent) == [RECORDS, saved.name]


def test_damaged_newest_checkpoint_gives_the_previous_with_a_warning(saved, caplog):
    newest = saved.with_name("tiny-ab-ep=10.ckpt")
    save_checkpoint({"state_dict": {"w": torch.ones(9)}}, newest)
    assert find_checkpoint(saved.parent) == newest
    newest.write_bytes(newest.read_bytes()[:-1])
    assert find_checkpoint(saved.parent) == saved
    assert "ep=10.ckpt is damaged" in caplog.text
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        find_checkpoint(saved.parent)


@pytest.mark.parametrize("values", [{"frequency": 0}, {"dir": ""}])
def test_checkpoint_config_is_checked(values):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(values))}"):
        CheckpointConfig(**values)


# Backbones.


def run_folder(tmp_path, name="resnet18", prefix="backbone.", **args):
    backbone = build_backbone(name, small_images=True)
    state = {prefix + key: x for key, x in backbone.state_dict().items()} | {
        "classifier.weight": torch.zeros(10, backbone.num_features),
        "momentum_" + prefix + "conv1.weight": torch.zeros(1),
    }
    save_checkpoint({"state_dict": state}, tmp_path / "x-ep=1.ckpt")
    if args:
        (tmp_path / "args.json").write_text(json.dumps(args))
    return backbone


CIFAR = {"backbone": {"name": "resnet18", "kwargs": {}}, "data": {"dataset": "cifar10"}, "method": "byol"}


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_load_encoder_from_a_run_folder_also_of_solo_learns_older_names(tmp_path, prefix):
    original = run_folder(tmp_path, prefix=prefix, **CIFAR)
    backbone, args = load_encoder(tmp_path)
    assert args == CIFAR and not backbone.training
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(x), original.eval()(x))


def test_a_checkpoint_of_another_network_is_refused_with_what_it_holds(tmp_path):
    run_folder(tmp_path, "resnet50", **{**CIFAR, "backbone": {"name": "resnet50"}})
    with pytest.raises(CheckpointError, match=r"holds a resnet50 \(features 2048\), but backbone.name is resnet18"):
        load_encoder(tmp_path, CIFAR)
    (tmp_path / "args.json").unlink()
    with pytest.raises(CheckpointError, match=r"backbone.name has to say"):
        load_encoder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"with 2048 features, not a resnet18 .features 512.: .*first layer1.0.conv"
    ):
        load_encoder(tmp_path, CIFAR)


def test_the_wrong_stem_is_a_mismatch_too(tmp_path):
    run_folder(tmp_path)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_encoder(tmp_path, {**CIFAR, "data": {"dataset": "imagenet"}})


@pytest.mark.parametrize("stages", ["full", "block4", "projector"])
def test_the_teachers_encoder_is_the_students_before_its_first_stage(tmp_path, stages):
    method = build("byol", momentum__stages=stages)
    with torch.no_grad():
        for name, x in method.named_parameters():
            if name.startswith("momentum_backbone."):
                x.add_(1)
    config = {"method": "byol", "backbone": {"name": "resnet10_w16"}, "data": {"dataset": "cifar10"}}
    (tmp_path / "args.json").write_text(json.dumps(config))
    torch.save({"state_dict": method.state_dict()}, tmp_path / "x-ep=0.ckpt")
    if stages == "projector":
        with pytest.raises(CheckpointError, match="the teacher begins after the backbone"):
            load_encoder(tmp_path, teacher=True)
        return
    student, teacher = (dict(load_encoder(tmp_path, teacher=t)[0].named_parameters()) for t in (False, True))
    raised = {name for name, x in teacher.items() if torch.equal(x, student[name] + 1)}
    same = {name for name, x in teacher.items() if torch.equal(x, student[name])}
    assert raised == {name for name in teacher if stages == "full" or name.startswith("layer4")}
    assert raised | same == teacher.keys()


def test_safetensors_in_a_run_folder(tmp_path):
    original = run_folder(tmp_path, **CIFAR)
    [checkpoint] = tmp_path.glob("*.ckpt")
    checkpoint.unlink()
    data = safetensors.torch.save(original.state_dict())
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    record = {"model.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
    (tmp_path / RECORDS).write_text(json.dumps(record))
    assert find_checkpoint(tmp_path) == path
    loaded = load_encoder(tmp_path)[0].state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in original.state_dict().items())
    for damaged, said in ((data[:-1], "differs from its SHA-256"), (b"<html>", "differs from its SHA-256")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)
    (tmp_path / RECORDS).unlink()
    for damaged, said in ((data[:-1], "is damaged"), (b"<html>", "but a web page"), (b"", "is empty")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)


# Runs: what they leave, and how they go on.


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return pretrain(config(tmp_path_factory.mktemp("whole"), checkpoint__keep_prev=True))


def interrupt(monkeypatch, step, how):
    """Does `how` at the end of optimizer step number `step`."""
    original = Throughput.on_train_batch_end

    def hook(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == step:
            how()

    monkeypatch.setattr(Throughput, "on_train_batch_end", hook)


def test_a_run_leaves_its_record(whole):
    folder = whole.dir
    checkpoints = [f"tiny-{folder.name}-ep={n}.ckpt" for n in range(3)]
    expected = ["args.json", RECORDS, "environment.json", "metrics.csv", "result.json", *checkpoints]
    assert names(folder) == sorted(expected)
    assert whole.checkpoint.name == checkpoints[-1]
    assert resolve(json.loads((folder / "args.json").read_text())) == config(
        folder.parents[1], checkpoint__keep_prev=True
    )
    assert (
        whole.images_per_s > 0
        and whole.metrics["val_acc1"] == json.loads((folder / "result.json").read_text())["metrics"]["val_acc1"]
    )
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert float(rows(folder)[0]["lr"]) > 0


def identical(a, b):
    if isinstance(a, dict | list):
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        return len(a) == len(b) and all(identical(x, y) for x, y in pairs)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "step, how, leaves",
    [(4, stop, "ep=1-step=1"), (6, stop, "ep=1"), (5, crash, "ep=0")],
    ids=["SIGTERM in an epoch", "SIGTERM at its end", "crash"],
)
def test_an_interrupted_run_resumes_exactly(whole, tmp_path, monkeypatch, step, how, leaves):
    cfg = config(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, step, how)
        with pytest.raises((SystemExit, ZeroDivisionError)) as error:
            pretrain(cfg)
    assert how is crash or error.value.code == 143
    [folder] = (tmp_path / "byol").iterdir()
    assert find_checkpoint(folder).name == f"tiny-{folder.name}-{leaves}.ckpt"

    resumed = pretrain(cfg)
    assert resumed.dir == folder and [p.name for p in folder.glob("*.ckpt")] == [resumed.checkpoint.name]
    old, new = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert identical(new[part], old[part]), part
    same = [r == s for r, s in zip(rows(folder), rows(whole.dir), strict=True)]
    # an epoch's means cover what this process saw of it
    assert same.count(False) == (leaves == "ep=1-step=1")
    assert len(json.loads((folder / "environment.json").read_text())["before"]) == 1


def test_a_resume_with_another_random_state_is_noticed(whole, tmp_path):
    other = load_checkpoint(pretrain(config(tmp_path, seed=6)).checkpoint)
    key = "backbone.layer1.0.conv1.weight"
    assert not torch.equal(other["state_dict"][key], load_checkpoint(whole.checkpoint)["state_dict"][key])


def test_a_finished_run_is_not_resumed(tmp_path, caplog):
    first = pretrain(config(tmp_path, max_epochs=1))
    second = pretrain(config(tmp_path, max_epochs=1))
    assert first.dir != second.dir and "is finished: starting a new run" in caplog.text
    (second.dir / "result.json").unlink()  # killed after the last checkpoint
    assert find_resumable(config(tmp_path, max_epochs=1), tmp_path / "byol") is None


def test_explicit_resume_continues_in_the_same_folder(whole, tmp_path):
    first = pretrain(config(tmp_path, max_epochs=1))
    longer = config(tmp_path, max_epochs=2, resume_from_checkpoint=str(first.dir))
    assert pretrain(longer).dir == first.dir
    assert {int(row["epoch"]) for row in rows(first.dir) if row["epoch"]} == {0, 1}
    with pytest.raises(ConfigError, match=r"max_epochs is 2, but .* has 2 epochs already"):
        pretrain(longer)
    wider = config(tmp_path, method_kwargs__proj_output_dim=5, resume_from_checkpoint=str(first.dir))
    with pytest.raises(CheckpointError, match=r"does not fit .*another shape"):
        pretrain(wider)
    other = config(tmp_path, method="mocov3", resume_from_checkpoint=str(first.dir))
    with pytest.raises(CheckpointError, match="holds method byol, but method is mocov3"):
        pretrain(other)


TWINS = {
    "seed": 6,
    "name": "other",
    "momentum.base_tau": 0.98,
    "momentum.stages": "projector",
    "momentum.stages ": {"block4": 0.9, "projector": 0.99},
    "intra.weight": 0.5,
    "method_kwargs.proj_output_dim": 5,
    "augmentations.0.crop_size": 13,
    "augmentations.0.horizontal_flip.prob": 0.4,
    "optimizer.lr": 0.4,
    "optimizer.batch_size": 8,
    "optimizer.weight_decay": 1e-9,
    "scheduler.warmup_epochs": 2,
    "max_epochs": 4,
    "data.fraction": 0.02,
    "data.train_path": "/elsewhere",
    "accumulate_grad_batches": 2,
    "devices": 2,
    "precision": "bf16-mixed",
    "gradient_clip_val": 1.0,
}


@pytest.mark.parametrize("key", TWINS)
def test_near_twins_do_not_resume_each_other(whole, key):
    base = config(whole.dir.parents[1])
    twin = config(whole.dir.parents[1], **{key.strip().replace(".", "__"): TWINS[key]})
    assert differences(base, twin) and not differences(twin, twin)


def test_what_does_not_concern_the_training_is_ignored(whole):
    same = {
        "wandb": {"enabled": True},
        "checkpoint": {"enabled": True, "dir": "x", "frequency": 5},
        "auto_resume": {"enabled": True, "max_hours": 1},
        "data.num_workers": 3,
        "log_every_n_steps": 7,
        "resume_from_checkpoint": "x",
        "devices": [0],
    }
    for key, value in same.items():
        twin = config(whole.dir.parents[1], **{key.replace(".", "__"): value})
        assert not differences(config(whole.dir.parents[1]), twin), key


def test_auto_resume_leaves_old_and_running_runs_alone(tmp_path, monkeypatch, caplog):
    cfg = config(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 4, crash)
        with pytest.raises(ZeroDivisionError):
            pretrain(cfg)
    base = tmp_path / "byol"
    [folder] = base.iterdir()
    assert find_resumable(cfg, base).path.parent == folder
    lock = RunLock(folder)
    assert lock.take() and find_resumable(cfg, base) is None and "is running" in caplog.text
    lock.release()
    [checkpoint] = folder.glob("*.ckpt")
    os.utime(checkpoint, (time.time() - 37 * 3600,) * 2)
    assert find_resumable(cfg, base) is None


@pytest.mark.parametrize("frequency", [1, 2, 3, 4])
@pytest.mark.parametrize("keep_prev", [False, True])
def test_the_last_epoch_is_always_saved(tmp_path, frequency, keep_prev):
    options = {
        "checkpoint__frequency": frequency,
        "checkpoint__keep_prev": keep_prev,
        "limit_train_batches": 1,
    }
    result = pretrain(config(tmp_path, max_epochs=4, limit_val_batches=0, **options))
    expected = sorted({*range(0, 4, frequency), 3}) if keep_prev else [3]
    saved = sorted(path.name for path in result.dir.glob("*.ckpt"))
    assert saved == [f"tiny-{result.dir.name}-ep={n}.ckpt" for n in expected]
    assert list(json.loads((result.dir / RECORDS).read_text())) == saved


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_finite_checkpoint(tmp_path, monkeypatch):
    original = METHODS["byol"].training_step

    def training_step(self, batch, i):
        return original(self, batch, i) * (math.nan if self.global_step == 4 else 1)

    monkeypatch.setattr(METHODS["byol"], "training_step", training_step)
    with pytest.raises(NonFiniteError, match="not finite since step 4 "):
        pretrain(config(tmp_path))
    [folder] = (tmp_path / "byol").iterdir()
    state = load_checkpoint(find_checkpoint(folder))["state_dict"]
    assert all(x.isfinite().all() for x in state.values()) and "ep=0" in find_checkpoint(folder).name


def test_weights_that_are_not_finite_are_not_saved():
    module = nn.Linear(2, 2)
    check_finite(module, 1)
    with torch.no_grad():
        module.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"after 7 steps 1 of 2 tensors .*first: weight"):
        check_finite(module, 7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer__batch_size": 51}, "optimizer.batch_size"),
        ({"backbone__kwargs": {"nonsense": 1}}, "backbone.kwargs"),
        ({"data__dataset": "custom", "data__train_path": "nowhere"}, "data.train_path"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere does not exist"),
        ({"val_check_interval": 1000}, "val_check_interval"),
        ({"limit_train_batches": 0}, "no step to train"),
        ({"profiler": "nonsense"}, "profiler"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(tmp_path, changes, message):
    folder = tmp_path / "runs"
    with pytest.raises(SoloExtError, match=message) as error:
        pretrain(config(folder, **changes))
    assert "\n" not in str(error.value) and not folder.exists()


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoint.dir"):
        pretrain(config(tmp_path / "file"))


# Evaluation.


@pytest.mark.parametrize("cached", [False, True])
def test_linear_evaluation_of_a_run(whole, tmp_path, cached):
    options = {
        "pretrained_feature_extractor": str(whole.dir),
        "cache_features": cached,
        "scheduler__name": "none",
    }
    result = linear(config(tmp_path, "linear", max_epochs=2, **options))
    assert result.dir.parent == tmp_path / "linear" and "args.json" in names(result.dir)
    written = json.loads((whole.dir / "linear.json").read_text())
    assert written["acc1"] == result.metrics["val_acc1"] and written["protocol"]["augmented"] is not cached
    assert written["protocol"]["checkpoint"] == whole.checkpoint.name and written["epochs"] == 2
    backbone = load_encoder(whole.dir)[0].state_dict()
    if not cached:  # the encoder, its batch statistics included, has not moved
        after = load_checkpoint(result.checkpoint)["state_dict"]
        assert all(torch.equal(after[f"backbone.{k}"], x) for k, x in backbone.items())


def test_the_untrained_encoder_is_the_one_that_the_pretraining_started_from(tmp_path):
    cfg = config(tmp_path, optimizer__lr=0.0, scheduler__name="none", limit_train_batches=1, max_epochs=1)
    pretrained = pretrain(cfg)
    start = load_checkpoint(pretrained.checkpoint)["state_dict"]
    cfg = config(tmp_path, "linear", untrained=True, max_epochs=1)
    after = load_checkpoint(linear(cfg).checkpoint)["state_dict"]
    weights = [name for name in after if name.startswith("backbone.") and name.endswith("weight")]
    assert weights and all(torch.equal(after[name], start[name]) for name in weights)


def test_knn_evaluation_of_a_run(whole, capsys):
    raw = {
        "pretrained_feature_extractor": str(whole.dir),
        "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01},
    }
    results = knn(resolve({**raw, "accelerator": "cpu", "knn_eval": {"k": [1, 20]}}, "knn"))
    assert json.loads((whole.dir / "knn.json").read_text())["results"] == results
    assert {(r["distance"], r["k"]) for r in results} >= {("cosine", 1), ("cosine", 20)}
    assert all(0 <= r["acc1"] <= r["acc5"] <= 100 for r in results) and "acc@1" in capsys.readouterr().out


def test_without_an_encoder_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="pretrained_feature_extractor is missing"):
        linear(config(tmp_path, "linear"))


# Two processes.


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_ranks_share_one_run(tmp_path, launcher):
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_runtime import config, pretrain\n"
        "two = dict(devices=2, strategy='ddp', optimizer__batch_size=8)\n"
        f"first = pretrain(config({str(tmp_path / 'runs')!r}, max_epochs=1, **two))\n"
        "again = {'max_epochs': 2, 'resume_from_checkpoint': str(first.dir)}\n"
        f"assert pretrain(config({str(tmp_path / 'runs')!r}, **again, **two)).dir == first.dir\n"
    )
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={29500 + os.getpid() % 1000}",
    ]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (tmp_path / "runs" / "byol").iterdir()
    assert rows(folder)[-1]["step"] == "5" and len(list(folder.glob("*.ckpt"))) == 1


# Metrics and surroundings.


def test_metrics_csv_has_all_columns_and_continues(tmp_path):
    csv_file = tmp_path / "metrics.csv"
    log = CSVMetrics(tmp_path)
    log.log_metrics({"loss": torch.tensor(1.5), "epoch": 0}, step=0)
    log.save()
    log.log_metrics({"loss": 1.25, "epoch": 0}, step=1)
    log.log_metrics({"val_acc1": 50.0}, step=1)
    log.finalize("failed")
    assert csv_file.read_text() == "epoch,step,loss,val_acc1\n0,0,1.5,\n0,1,1.25,50.0\n"
    resumed = CSVMetrics(tmp_path, resume_at=1)  # row 1 is made again
    resumed.log_metrics({"tau": 0.9}, step=1)
    resumed.save()
    assert csv_file.read_text() == "epoch,step,loss,val_acc1,tau\n0,0,1.5,,\n,1,,,0.9\n"
    CSVMetrics(tmp_path).finalize("success")  # nothing logged: nothing touched
    assert "tau" in csv_file.read_text()


CANARY = "canary0123" * 4


def test_wandb_without_key_or_network_goes_offline_in_one_line(tmp_path):
    """For real, at a terminal: it neither asks nor hangs, and no file holds the key."""
    script = """if True:
        import os, socket, sys, wandb
        from pathlib import Path
        from solo_ext.training.loggers import WandbConfig, close, wandb_logger

        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            for name, env in (("no-key", {}), ("no-net", {"WANDB_API_KEY": os.environ["CANARY"]})):
                os.environ |= {"WANDB_BASE_URL": url, **env}
                logger = wandb_logger(WandbConfig(enabled=True), "x", Path(name))
                logger.log_metrics({"loss": 1.0}, step=3)
                assert logger.experiment.id == name and logger.experiment.offline
                close([logger])
                wandb.teardown()
                server.close()
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and "proxy" not in k.lower()}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1]), "CANARY": CANARY}
    master, terminal = pty.openpty()
    for name in ("no-key", "no-net"):
        (tmp_path / name).mkdir()
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, timeout=120, **ends)
    os.close(terminal)
    said = os.read(master, 10_000).decode().splitlines()
    assert done.returncode == 0, said
    assert len(said) == 2 and all("; logging offline to no-" in line for line in said), said
    assert said[0].startswith("wandb: No API key") and said[1].startswith("wandb: 127.0.0.1 cannot be reached")
    assert len(list(tmp_path.glob("no-*/wandb/offline-run-*/run-no-*.wandb"))) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in path.read_bytes() for path in files)


def test_a_server_that_never_answers_is_not_waited_for():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert reachable(url)
    assert not reachable(url)
    began = time.monotonic()
    reachable("http://no-such-host.invalid", 0.2)
    assert time.monotonic() - began < 2


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
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: bf16)
    assert hardware.pick_precision(TrainerConfig(precision=requested, accelerator=accelerator)) == expected
    assert len(caplog.records) == (expected != {16: "16-mixed", 32: "32"}.get(requested, requested))


def test_environment_names_versions_but_neither_host_nor_secrets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["solo-ext", "pretrain", f"++wandb.api_key={CANARY}", "seed=1"])
    here = environment()
    text = json.dumps(here)
    assert CANARY not in text and socket.gethostname() not in text
    assert here["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert here["command"][-1] == "seed=1" and here["cores"] >= 1


def test_tensorboard_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'solo-ext\[viz\]'"):
        TensorboardConfig(enabled=True)


# A method, data and callbacks of one's own.


class Counter(pl.Callback):
    steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1


class MyBYOL(METHODS["byol"]):
    pass


class Views(pl.LightningDataModule):
    """Two batches of random views."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(random_batches(2, size=12), batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize(
    "method, name",
    [
        ("projector_ema_byol", "projector_ema_byol"),
        (METHODS["res_byol"], "res_byol"),
        (MyBYOL, "MyBYOL"),
        (MyBYOL(tiny_config("byol")), "MyBYOL"),
    ],
    ids=["name", "class", "own class", "built"],
)
def test_a_method_data_and_callbacks_of_the_callers_own(tmp_path, capsys, method, name):
    cfg, counter = config(tmp_path, max_epochs=1), Counter()
    run = pretrain(cfg, method=method, data=Views(), callbacks=[counter])
    assert counter.steps == 2 and run.dir.parent == tmp_path / name
    assert json.loads((run.dir / "args.json").read_text())["method"] == name and cfg.method == "byol"
    assert json.loads((run.dir / "environment.json").read_text())["data"] == "Views"
    assert capsys.readouterr().out.splitlines()[0] == f"tiny: cpu, {run.dir}"


def test_a_name_that_is_no_method_is_refused_before_anything_else(tmp_path, capsys):
    with pytest.raises(ConfigError, match="there is no method 'byoll'; did you mean 'byol'"):
        pretrain(config(tmp_path), method="byoll")
    assert not capsys.readouterr().out and not any(tmp_path.iterdir())


def test_the_first_line_says_where_a_run_lies_and_what_it_resumes(tmp_path, monkeypatch, capsys):
    cfg = config(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 4, crash)
        with pytest.raises(ZeroDivisionError):
            pretrain(cfg)
    [folder] = (tmp_path / "byol").iterdir()
    assert capsys.readouterr().out.splitlines()[0] == f"tiny: cpu, {folder}"
    reads = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (reads.append(1), original(*args, **kwargs))[1])
    pretrain(cfg)
    assert capsys.readouterr().out.splitlines()[0] == f"tiny: cpu, {folder}, resuming tiny-{folder.name}-ep=0.ckpt"
    assert len(reads) == 1, "the checkpoint is read once"


@pytest.mark.parametrize(
    "module, slow",
    [
        ("solo_ext.training.pretrain", ["solo_ext.training.trainer", "solo_ext.data.modules", "timm"]),
        ("solo_ext.data.datasets", ["torchvision", "h5py", "lightning"]),
    ],
)
def test_the_first_line_comes_before_what_is_slow_to_import(module, slow):
    code = f"import sys, {module}; print(*(m in sys.modules for m in {slow}))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"] * len(slow), done.stderr


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
    assert devices_text(cfg) == text
    cfg.num_nodes = 2
    assert devices_text(cfg) == f"{text}, 2 nodes"


def test_a_file_of_json_is_an_object_or_damaged(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) is None
    for content in ("{", "[1]", "\xff", '{"results": {}}'):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"x.json is damaged: [^\n]*$"):
            read_json(path, results=list)
