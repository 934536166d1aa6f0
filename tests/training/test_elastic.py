"""A run that is continued on another number of processes is the run that it was: samples, views, rates, weights."""

import csv
import json
import signal
import zlib
from itertools import chain

import pytest
import torch
from test_ddp import OWN, YAMLS, one_process, slurm
from tiny_runs import config, crash, interrupted

from solo_ext.errors import ConfigError
from solo_ext.runs.checkpoints import find_checkpoint, find_resumable, load_checkpoint
from solo_ext.runs.comparison import differences
from solo_ext.schema import plain
from solo_ext.training.pretrain import pretrain
from solo_ext.training.resume import ExactResume
from solo_ext.training.start import begin, keep_batch

METHOD = "mocov2plus"  # with a queue, which is alike on all ranks, and gathered keys
JOINT, STEPS = 24, 12  # images of a batch, which two processes begin; optimizer steps of three epochs of 100 images
SUMS = {"rtol": 1e-9, "atol": 1e-9}  # another number of processes sums in another order


def words(folder, processes):
    return [
        str(YAMLS / f"{METHOD}.yaml"),
        f"devices={processes}",
        f"optimizer.batch_size={JOINT // 2}",
        f"checkpoint.dir={folder}",
        *("sync_batchnorm=true", "accelerator=cpu", "precision=64-true", "performance.disable_channel_last=true"),
        *("max_epochs=3", "++data.fraction=0.02", "knn_eval.enabled=false", "++enable_progress_bar=false"),
        *("++log_every_n_steps=1", "++limit_val_batches=1", "++gap.every=1"),
        "method_kwargs.queue_size=100",  # no multiple of a batch
    ]


def noting(rank, job, command, log, stop):
    """`one_process` that appends each step to a file of the rank: samples, checksums of their views, lr and tau."""
    [folder] = (word.partition("=")[2] for word in command if word.startswith("checkpoint.dir="))
    start = ExactResume.on_train_batch_start

    def noted(self, trainer, module, batch, i):
        indexes, views, _ = batch
        sums = [[zlib.crc32(x.numpy().tobytes()) for x in view] for view in views]
        tau = module.teacher.tau(trainer.global_step, trainer.estimated_stepping_batches)
        step = {"step": trainer.global_step, "samples": indexes.tolist(), "views": [*zip(*sums, strict=True)]}
        step |= {"lr": [group["lr"] for group in trainer.optimizers[0].param_groups], "tau": tau}
        with open(f"{folder}.{rank}", "a", encoding="utf-8") as file:
            print(json.dumps(step), file=file)
        start(self, trainer, module, batch, i)

    ExactResume.on_train_batch_start = noted
    one_process(rank, job, command, log, stop)


def steps(folder, processes):
    """What these processes, all together and in their order, have done since the last call."""
    ranks = [folder.with_name(f"{folder.name}.{rank}") for rank in range(processes)]
    rows = [[json.loads(line) for line in rank.read_text().splitlines()] for rank in ranks]
    for rank in ranks:
        rank.unlink()
    return [
        step[0] | {key: [*chain.from_iterable(row[key] for row in step)] for key in ("samples", "views")}
        for step in zip(*rows, strict=True)
    ]


def run_of(folder, legs):
    """The folder of a run, continued by each of `legs` = (processes, step at which it is stopped), and its steps."""
    done = []
    for processes, stop in legs:
        told = (processes - 1, stop, signal.SIGTERM) if stop else None
        command = ["pretrain", *words(folder, processes)]
        (code, output), *_ = slurm(*command, stop=told, processes=processes, target=noting)
        assert code == (143 if stop else 0), output
        done += steps(folder, processes)
    [run] = (folder / METHOD).iterdir()
    return run, done


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k not in OWN} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_goes_on_on_any_number_of_processes(tmp_path):
    whole, expected = run_of(tmp_path / "whole", [(2, None)])
    # each inside an epoch of four steps: several processes that are told to stop in step n end after the next
    parts, found = run_of(tmp_path / "parts", [(2, 1), (3, 5), (1, 9), (2, None)])
    assert found == expected and [step["step"] for step in found] == [*range(STEPS)]
    assert len(json.loads((parts / "environment.json").read_text())["before"]) == 3, "one run, continued three times"
    states = [load_checkpoint(find_checkpoint(run))["state_dict"] for run in (parts, whole)]
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, **SUMS, msg=lambda text, name=name: f"{name}: {text}")
    assert len(rows(parts)) == len(rows(whole))
    for mine, theirs in zip(rows(parts), rows(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5), "with the means of the epochs that were cut"


def test_the_batch_of_a_run_is_kept_or_refused(tmp_path, monkeypatch, capsys, caplog):
    folder, _ = interrupted(config(tmp_path), monkeypatch, 4, crash)  # with batches of 16
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = find_resumable(wide := config(tmp_path, devices=2), tmp_path / "byol")
    rate = wide.optimizer.effective_lr
    assert found.path.parent == folder and keep_batch(wide, found.config) == 8
    assert wide.optimizer.effective_lr == rate / 2 == config(tmp_path).optimizer.effective_lr
    assert keep_batch(config(tmp_path, devices=2, optimizer__batch_size=12), found.config) == 12, "another is asked for"
    assert keep_batch(config(tmp_path, devices=2, accumulate_grad_batches=2), found.config) == 16
    assert begin(config(tmp_path, devices=2), tmp_path / "byol").run.dir == folder
    assert ", 8 images on each device; follow" in capsys.readouterr().out.replace("\n", "; ")
    assert "sync_batchnorm=false: a BatchNorm sees the 8 images of its device" in caplog.text
    message = "devices: 3 cannot share the 16 images of a batch of the run evenly, as 1, 2, 4 can; another"
    with pytest.raises(ConfigError, match=message):
        pretrain(config(tmp_path, devices=3))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    saved = plain(config(tmp_path))
    assert not differences(saved, plain(config(tmp_path, devices=2)))
    del saved["optimizer"]["joint_batch"]  # as of an older version
    assert [text.split(":")[0] for text in differences(saved, plain(config(tmp_path, devices=2)))] == [
        "optimizer.effective_lr",
        "optimizer.effective_classifier_lr",
    ]
