"""Checkpoints at the right moments, and an end where the loss or a weight is not finite."""

import json
import math
import random
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny_runs import config, die, ended_by, interrupted, rows
from torch import nn

from solo_ext.errors import CheckpointError, CollapseError, ConfigError, NonFiniteError
from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import CheckpointConfig, find_checkpoint, load_checkpoint
from solo_ext.runs.run import RECORDS, Run
from solo_ext.training import safety
from solo_ext.training.finite import check_finite
from solo_ext.training.pretrain import pretrain
from solo_ext.training.resume import ExactResume
from solo_ext.training.safety import Checkpointer, Stopped


@pytest.mark.parametrize("frequency", [1, 2, 3, 4])
@pytest.mark.parametrize("keep_prev", [False, True])
def test_the_last_epoch_is_always_saved(tmp_path, frequency, keep_prev):
    options = {
        "checkpoint__frequency": frequency,
        "checkpoint__keep_prev": keep_prev,
        "limit_train_batches": 1,
    }
    result = pretrain(config(tmp_path, max_epochs=4, limit_val_batches=0, **options))
    expected = sorted({*range(0, 4, frequency), 3})[0 if keep_prev else -2 :]
    saved = sorted(path.name for path in result.dir.glob("*.ckpt"))
    assert saved == [f"tiny-{result.dir.name}-ep={n}.ckpt" for n in expected]
    assert list(json.loads((result.dir / RECORDS).read_text())) == saved
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")], "its writer"


def kept(result):
    names = [path.name for path in result.dir.glob("*.ckpt")]
    return sorted(name.partition(f"{result.dir.name}-")[2].removesuffix(".ckpt") for name in names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_last": 1}, ["ep=4"]),
        ({"keep_last": 3}, ["ep=2", "ep=3", "ep=4"]),
        ({"keep_last": 1, "keep_every": 2}, ["ep=1", "ep=3", "ep=4"]),
        ({"keep_last": 1, "keep_best": "score"}, ["ep=1", "ep=4"]),
        ({"keep_last": 1, "keep_best": "score_loss"}, ["ep=3", "ep=4"]),
        ({"every_n_steps": 2, "keep_last": 3}, ["ep=3", "ep=4", "ep=4-step=2"]),
        ({"every_n_steps": 1, "keep_prev": True, "keep_last": 1}, ["ep=0", "ep=1", "ep=2", "ep=3", "ep=4"]),
        ({"every_minutes": 1e-9, "keep_last": 4}, ["ep=4", "ep=4-step=1", "ep=4-step=2", "ep=4-step=3"]),
    ],
)
def test_which_checkpoints_are_made_and_stay(tmp_path, options, expected):
    class Scores(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            value = [10.0, 40.0, 20.0, 0.0, 30.0][trainer.current_epoch]
            module.log_dict({"score": value, "score_loss": value})

    changes = {f"checkpoint__{key}": value for key, value in options.items()}
    cfg = config(tmp_path, limit_val_batches=0, max_epochs=5, **changes)
    result = pretrain(cfg, callbacks=[Scores()])
    assert kept(result) == expected
    assert list(json.loads((result.dir / RECORDS).read_text())) == sorted(p.name for p in result.dir.glob("*.ckpt"))


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """In steps of 25 seconds, one is saved after each third; that of the epoch's end starts the minute anew."""
    seconds = [0.0]

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_):
            seconds[0] += 25

    monkeypatch.setattr(safety.time, "monotonic", lambda: seconds[0])
    options = {"checkpoint__every_minutes": 1, "checkpoint__keep_last": 9, "optimizer__batch_size": 5}
    result = pretrain(config(tmp_path, limit_val_batches=0, max_epochs=2, **options), callbacks=[Clock()])
    assert kept(result) == [
        *("ep=0", "ep=0-step=3", "ep=0-step=6", "ep=0-step=9"),
        "ep=1",
        "ep=1-step=3",
        "ep=1-step=6",
        "ep=1-step=9",
    ]


def test_a_run_that_max_steps_ends_inside_an_epoch_is_saved_there(tmp_path):
    result = pretrain(config(tmp_path, limit_val_batches=0, max_epochs=5, max_steps=5))
    assert kept(result) == ["ep=0", "ep=1-step=2"]


def test_a_weight_that_became_nan_is_not_saved(tmp_path):
    class Poison(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                module.backbone.conv1.weight.data[0] = math.nan

    with pytest.raises(NonFiniteError, match=r"after 6 steps .* it is not saved"):
        pretrain(config(tmp_path, limit_val_batches=0), callbacks=[Poison()])
    [folder] = (tmp_path / "byol").iterdir()
    assert find_checkpoint(folder).name.endswith("ep=0.ckpt")


@pytest.mark.parametrize("processes", [1, 2])
def test_after_which_errors_a_run_is_saved(tmp_path, processes):
    """Several processes save only after what has ended all of them alike."""
    saved: list[int] = []
    checkpointer = Checkpointer(Run(tmp_path), "tiny", CheckpointConfig(enabled=True))
    checkpointer._save = lambda trainer, module, epoch, batch=None: saved.append(epoch)
    epochs = SimpleNamespace(current=SimpleNamespace(started=2, processed=2))
    batches = SimpleNamespace(batch_progress=SimpleNamespace(current=None))
    loop = SimpleNamespace(epoch_progress=epochs, epoch_loop=batches)
    trainer = SimpleNamespace(world_size=processes, global_step=6, fit_loop=loop)
    errors = [Stopped(15), CollapseError("x"), ZeroDivisionError(), NonFiniteError("x"), CheckpointError("x")]
    after = []
    for error in errors:
        saved.clear()
        checkpointer.on_exception(trainer, None, error)
        after.append(saved == [1])
    assert after == [True, True, processes == 1, False, False]


def test_a_metric_that_there_is_not_is_named_at_the_first_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best: there is no metric 'val_acc'; did.*val_acc5"):
        pretrain(config(tmp_path, checkpoint__keep_best="val_acc"))
    [folder] = (tmp_path / "byol").iterdir()
    assert find_checkpoint(folder).name.endswith("ep=0.ckpt"), "the epoch is not lost"


def killed(folder):
    interrupted(config(folder), pytest.MonkeyPatch(), 2, die)


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again_in_its_folder(whole, tmp_path):
    assert ended_by(killed, tmp_path) == signal.SIGKILL
    [folder] = (tmp_path / "byol").iterdir()
    assert pretrain(config(tmp_path, seed=6)).dir != folder, "a twin"
    result = pretrain(config(tmp_path))
    assert result.dir == folder and rows(folder) == rows(whole.dir)


class Weights(pl.Callback):
    """The network after each step."""

    def __init__(self):
        self.after = []

    def on_train_start(self, trainer, module):
        self.module = module

    def on_train_batch_end(self, trainer, module, out, batch, i):
        self.after.append(self.now())

    def now(self):
        return {name: x.detach().clone() for name, x in self.module.named_parameters()}


@pytest.fixture
def bad_at(monkeypatch):
    """Makes the loss, or only a gradient, of a micro-batch bad."""

    def bad_at(number, value, where):
        def training_step(self, batch, i, original=METHODS["byol"].training_step):
            loss, parts = original(self, batch, i), self.loss_parts
            self.seen = getattr(self, "seen", -1) + 1
            if self.seen == number and where == "loss":
                self.loss_parts = parts | {"train_neg_cos_sim": torch.tensor(value)}
                return loss * value
            if self.seen == number:
                loss.register_hook(lambda gradient: gradient * value)
            return loss

        monkeypatch.setattr(METHODS["byol"], "training_step", training_step)

    return bad_at


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("where", "accumulate", "step"), [("loss", 1, 4), ("gradient", 1, 4), ("loss", 3, 1)])
def test_a_bad_number_touches_no_weight(tmp_path, bad_at, where, accumulate, step, value):
    bad_at(4, value, where)
    seen = Weights()
    with pytest.raises(NonFiniteError) as error:
        pretrain(config(tmp_path, accumulate_grad_batches=accumulate), callbacks=[seen])
    now, last = seen.now(), seen.after[-1]
    assert all(torch.equal(now[name], x) for name, x in last.items()) and all(x.isfinite().all() for x in now.values())
    bad = f"the loss became NaN or infinite at step {step}, train_neg_cos_sim {value:g}, train_class_loss 2."
    fine = f"the losses are finite, but a gradient became NaN or infinite at step {step}, train_neg_cos_sim"
    assert str(error.value).startswith(bad if where == "loss" else fine)
    assert re.search(r"samples \d+(, \d+){15}; no weight is changed", str(error.value))
    [folder] = (tmp_path / "byol").iterdir()
    state = load_checkpoint(find_checkpoint(folder))["state_dict"]
    assert all(x.isfinite().all() for x in state.values()) and "ep=0" in find_checkpoint(folder).name


@pytest.mark.parametrize("number", [0, 4])
def test_bad_steps_can_be_left_out(tmp_path, bad_at, caplog, number):
    """The first one too, which makes the state of the optimizer."""
    bad_at(number, math.nan, "gradient")
    initial = METHODS["byol"](prepared := config(tmp_path, skip_non_finite=1, max_epochs=2))
    seen = Weights()
    result = pretrain(prepared, callbacks=[seen], method=initial)
    before = [None, *seen.after]
    assert "the step is left out (1 of at most 1)" in caplog.text
    for name, x in seen.after[number].items():
        if number and not name.startswith("momentum_"):
            assert torch.equal(x, before[number][name]), name
    assert math.isfinite(result.metrics["val_loss"])
    state = load_checkpoint(result.checkpoint)
    momenta = [x["momentum_buffer"] for x in state["optimizer_states"][0]["state"].values()]
    assert momenta and all(x.isfinite().all() for x in momenta)
    assert any(not torch.equal(x, seen.after[number][name]) for name, x in seen.after[number + 1].items())


def test_weights_that_are_not_finite_are_not_saved():
    module = nn.Linear(2, 2)
    check_finite(module, 1)
    with torch.no_grad():
        module.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"after 7 steps 1 of 2 tensors .*first: weight"):
        check_finite(module, 7)


def test_what_a_network_draws_follows_from_seed_epoch_batch_and_rank():
    def drawn(seed=1, epoch=2, batch=3, rank=0):
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        ExactResume(seed).on_train_batch_start(trainer, None, None, batch)
        return torch.rand(()).item(), np.random.rand(), random.random()

    others = [drawn(seed=2), drawn(epoch=3), drawn(batch=4), drawn(rank=1)]
    assert drawn() == drawn() and len({drawn(), *others}) == 5


def test_a_file_that_cannot_be_removed_stays_and_is_named(tmp_path, monkeypatch, caplog):
    """Such as an old checkpoint and the lock, on a disk that went read-only for a while."""
    unlink, refused = Path.unlink, []

    def refuse(path, **options):
        if path.suffix == ".ckpt" or path.name == ".lock":
            refused.append(path)
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    run = pretrain(config(tmp_path, checkpoint__keep_last=1))
    assert (run.dir / "result.json").is_file() and len([*run.dir.glob("*.ckpt")]) == 3
    for path in refused:
        assert f"{path} cannot be removed: Permission denied" in caplog.text
    assert not Run(run.dir).running, "its lock is open"
