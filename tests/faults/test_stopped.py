"""Runs that are stopped at every place and in every way: the same command makes of them what a whole run is."""

import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny_runs import config, die, ended_by, rows
from trials import ALL, trials

from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.run import Run
from solo_ext.training import safety
from solo_ext.training.pretrain import pretrain

EPOCHS, STEPS = 2, 3
SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
PLACES = [
    *(f"batch {epoch} {i}" for epoch in range(EPOCHS) for i in range(2 * STEPS)),
    *(f"validation {epoch} {i}" for epoch in range(EPOCHS) for i in range(2)),
    *(f"{place} {epoch}" for place in ("epoch end", "writing", "written") for epoch in range(EPOCHS)),
    "train end",
    "result",
]


class At(pl.Callback):
    """Calls `how`, once, at a place of a run."""

    def __init__(self, place, how):
        self.place, self.how = place, how

    def reached(self, place):
        if place == self.place:
            self.place = None
            self.how()

    def on_train_batch_end(self, trainer, module, out, batch, i):
        self.reached(f"batch {trainer.current_epoch} {i}")

    def on_validation_batch_end(self, trainer, module, out, batch, i, loader=0):
        self.reached(f"validation {trainer.current_epoch} {i}")

    def on_train_epoch_end(self, trainer, module):
        self.reached(f"epoch end {trainer.current_epoch}")

    def on_train_end(self, trainer, module):
        self.reached("train end")


def options(accumulate):
    """In 6 batches per epoch, 3 steps or, with an uneven group at the end, 2."""
    return {
        "max_epochs": EPOCHS,
        "optimizer__batch_size": 8,
        "accumulate_grad_batches": accumulate,
        "limit_val_batches": 2,
        "log_every_n_steps": 1,
    }


def attempt(cfg, place, how, monkeypatch):
    """A run of `cfg` that `how` meets at `place`."""
    at, save, finish = At(place, how), safety.save_checkpoint, Run.finish

    def saving(checkpoint, path):
        at.reached(f"writing {checkpoint['epoch']}")
        save(checkpoint, path)
        at.reached(f"written {checkpoint['epoch']}")

    def finishing(run, result):
        at.reached("result")
        finish(run, result)

    with monkeypatch.context() as patch:
        patch.setattr(safety, "save_checkpoint", saving)
        patch.setattr(Run, "finish", finishing)
        return pretrain(cfg, callbacks=[at])


@pytest.fixture(scope="module", params=[2, 4])
def uncut(request, tmp_path_factory):
    return request.param, pretrain(config(tmp_path_factory.mktemp("uncut"), **options(request.param)))


def assert_same(result, uncut, tmp_path):
    [folder] = (tmp_path / "byol").iterdir()
    assert result.dir == folder and Run(folder).finished
    old, new = load_checkpoint(uncut.checkpoint), load_checkpoint(result.checkpoint)
    assert new["global_step"] == old["global_step"] and new["epoch"] == old["epoch"]
    assert all(torch.equal(new["state_dict"][key], x) for key, x in old["state_dict"].items())
    assert rows(folder) == rows(uncut.dir)
    for key in ("train_loss", "val_acc1", "tau"):
        assert result.metrics[key] == pytest.approx(uncut.metrics[key], rel=1e-6)
    assert not [*folder.glob(".*")], "left over"


@pytest.mark.parametrize(("place", "name"), trials(product(PLACES, SIGNALS), 0.05))
def test_a_signal_saves_and_the_same_command_continues(uncut, place, name, tmp_path, monkeypatch):
    """At most one group of accumulated batches is lost: none."""
    accumulate, whole = uncut
    cfg = config(tmp_path, **options(accumulate))
    number = signal.Signals[name]
    inherited = signal.getsignal(number)
    if inherited == signal.SIG_IGN:  # as nohup leaves SIGHUP
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    try:
        result = attempt(cfg, place, lambda: signal.raise_signal(number), monkeypatch)
    except (SystemExit, KeyboardInterrupt) as stopped:
        assert isinstance(stopped, KeyboardInterrupt) or stopped.code == 128 + number
    else:
        over = place == "train end" or (place.split()[0] in ("epoch", "writing", "written") and place.endswith("1"))
        assert over, "there is nothing left to stop"
        return assert_same(result, whole, tmp_path)
    finally:
        assert signal.signal(number, inherited) == before
    trained = []
    count = At(None, None)
    count.on_train_batch_end = lambda trainer, *rest: trained.append(trainer.current_epoch)
    result = pretrain(cfg, callbacks=[count])
    assert_same(result, whole, tmp_path)
    if place.startswith("batch"):
        epoch, i = map(int, place.split()[1:])
        group = min(2 * STEPS, (i // accumulate + 1) * accumulate)  # which was to end
        assert len(trained) == 2 * STEPS * EPOCHS - (2 * STEPS * epoch + group), "none is trained twice"


def ended(folder, accumulate, place, how, every_n_steps=None):
    cfg = config(folder, **options(accumulate), checkpoint__every_n_steps=every_n_steps)
    attempt(cfg, place, how, pytest.MonkeyPatch())


@pytest.mark.parametrize(("place", "every_n_steps"), trials(product(PLACES, [None, 1])))
def test_a_killed_run_is_continued_by_the_same_command(uncut, place, every_n_steps, tmp_path):
    accumulate, whole = uncut
    assert ended_by(ended, tmp_path, accumulate, place, die, every_n_steps) == signal.SIGKILL
    assert_same(pretrain(config(tmp_path, **options(accumulate))), whole, tmp_path)


def terminate_twice():
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)


def test_the_second_signal_leaves_at_once(tmp_path):
    assert ended_by(ended, tmp_path, 2, "batch 0 0", terminate_twice) == signal.SIGTERM


CLUSTER = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from test_stopped import At, config
from solo_ext.training.pretrain import pretrain
options = {"data__format": "image_folder", "data__num_workers": 2, "max_epochs": 3, "log_every_n_steps": 1}
for inherited in (signal.SIGHUP, signal.SIGINT):  # as nohup and shells leave them
    signal.signal(inherited, signal.default_int_handler if inherited == signal.SIGINT else signal.SIG_DFL)
place = sys.argv[1] and At("batch 1 0", lambda: os.killpg(0, signal.Signals[sys.argv[1]]))
pretrain(config(sys.argv[2], **options), callbacks=[place] if place else [])
"""


@pytest.mark.parametrize("name", SIGNALS if ALL else ["SIGTERM"])
def test_a_signal_to_the_workers_too_saves(tmp_path, name):
    """As clusters and terminals send them: to all processes of a job."""

    def run(name):
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        command = [sys.executable, "-c", CLUSTER, name, str(tmp_path), *paths]
        return subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)

    stopped = run(name)
    assert stopped.returncode == 128 + signal.Signals[name], stopped.stderr
    assert f"{name}: stopping after this step" in stopped.stderr and "Traceback" not in stopped.stderr
    [folder] = (tmp_path / "byol").iterdir()
    assert Run(folder).checkpoints[0].name.endswith("-ep=1-step=1.ckpt")
    done = run("")
    assert done.returncode == 0 and f"{folder}, resuming" in done.stdout and Run(folder).finished, done.stderr
