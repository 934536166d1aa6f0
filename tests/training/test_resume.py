"""Runs: what they leave, and how they resume."""

import json
import os
import signal
import time

import pytest
import torch
from tiny_runs import config, crash, interrupted, names, rows

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.checkpoints import find_checkpoint, find_resumable, load_checkpoint
from solo_ext.runs.comparison import differences
from solo_ext.runs.locks import RunLock
from solo_ext.runs.run import RECORDS, Run
from solo_ext.schema import plain
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain


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
    assert float(next(row["lr"] for row in rows(folder) if row["lr"])) > 0


def identical(a, b):
    if isinstance(a, dict | list):
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        return len(a) == len(b) and all(identical(x, y) for x, y in pairs)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "step, how, leaves",
    [(4, stop, "ep=1-step=1"), (6, stop, "ep=1-step=3"), (9, stop, "ep=2-step=3"), (5, crash, "ep=1-step=2")],
    ids=["in an epoch", "before a validation", "after the last step", "an error between two steps"],
)
def test_an_interrupted_run_resumes_exactly(whole, tmp_path, monkeypatch, step, how, leaves):
    cfg = config(tmp_path)
    folder, error = interrupted(cfg, monkeypatch, step, how)
    assert how is crash or error.code == 143
    assert find_checkpoint(folder).name == f"tiny-{folder.name}-{leaves}.ckpt"

    resumed = pretrain(cfg)
    assert resumed.dir == folder
    kept = [leaves if step == 9 else "ep=1", "ep=2"]
    assert {path.name for path in folder.glob("*.ckpt")} == {f"tiny-{folder.name}-{place}.ckpt" for place in kept}
    old, new = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert identical(new[part], old[part]), part
    assert rows(folder) == rows(whole.dir), "with the means of the epoch that was cut"
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
    third = pretrain(config(tmp_path, max_epochs=1))
    assert third.dir == second.dir and third.checkpoint == second.checkpoint
    assert third.metrics.items() >= {"val_acc1": second.metrics["val_acc1"]}.items()
    assert find_resumable(config(tmp_path, max_epochs=1), tmp_path / "byol") is None, "its result is written"


def test_explicit_resume_continues_in_the_same_folder(whole, tmp_path):
    first = pretrain(config(tmp_path, max_epochs=1))
    longer = config(tmp_path, max_epochs=2, resume_from_checkpoint=str(first.dir))
    assert pretrain(longer).dir == first.dir
    assert {int(row["epoch"]) for row in rows(first.dir) if row["epoch"]} == {0, 1}
    with pytest.raises(ConfigError, match=r"max_epochs is 2, but .* already has 2 epochs"):
        pretrain(longer)
    wider = config(tmp_path, method_kwargs__proj_output_dim=5, resume_from_checkpoint=str(first.dir))
    with pytest.raises(CheckpointError, match=r"does not fit .*another shape"):
        pretrain(wider)
    other = config(tmp_path, method="mocov3", resume_from_checkpoint=str(first.dir))
    with pytest.raises(CheckpointError, match="trained with another method: byol -> mocov3"):
        pretrain(other)


@pytest.mark.parametrize("heads", [(None, 6), (6, None)])
def test_the_heads_of_a_vit_cannot_change_at_a_resume(tmp_path, heads):
    vit = {"img_size": 12, "patch_size": 6, "depth": 1}
    first, then = ({**vit, **({"num_heads": n} if n else {}), "drop_path_rate": n or 0} for n in heads)
    options = {"backbone__name": "vit_tiny", "max_epochs": 1, "limit_train_batches": 1}
    run = pretrain(config(tmp_path, backbone__kwargs=first, **options)).dir
    options |= {"resume_from_checkpoint": str(run), "max_epochs": 2}
    with pytest.raises(CheckpointError, match=r"was trained with another backbone\.kwargs.num_heads: . -> ."):
        pretrain(config(tmp_path, backbone__kwargs=then, **options))
    assert pretrain(config(tmp_path, backbone__kwargs={**first, "drop_path_rate": 0.5}, **options)).dir == run


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"optimizer__weight_decay": 0.5}, {"weight_decay": 0.5}),
        ({"scheduler__name": "none", "optimizer__lr": 0.8}, {"lr": 0.05}),
        ({"scheduler__name": "step", "scheduler__lr_decay_steps": [1], "optimizer__lr": 0.8}, {"lr": 0.005}),
    ],
)
def test_options_changed_on_resume_are_used(tmp_path, changes, options):
    first = pretrain(config(tmp_path, max_epochs=1))
    again = pretrain(config(tmp_path, max_epochs=2, resume_from_checkpoint=str(first.dir), **changes))
    group = load_checkpoint(again.checkpoint)["optimizer_states"][0]["param_groups"][0]
    assert {key: group[key] for key in options} == pytest.approx(options)


def test_a_schedule_that_is_new_on_resume_goes_on_at_its_step(tmp_path):
    values = {"scheduler__name": "warmup_cosine", "scheduler__warmup_epochs": 0}
    whole = pretrain(config(tmp_path / "whole", max_epochs=3, **values))
    first = pretrain(config(tmp_path / "parts", max_epochs=1, scheduler__name="none"))
    parts = pretrain(config(tmp_path / "parts", max_epochs=3, resume_from_checkpoint=str(first.dir), **values))
    rates = [{row["step"]: row["lr"] for row in rows(run.dir) if row["lr"]} for run in (whole, parts)]
    later = [step for step in rates[0] if int(step) >= 3]
    assert later and [rates[1][step] for step in later] == [rates[0][step] for step in later]


@pytest.mark.parametrize("change", [{"optimizer__name": "adamw"}, {"optimizer__exclude_bias_n_norm_wd": True}])
def test_what_an_optimizers_state_does_not_fit_is_refused_before_anything_is_written(tmp_path, change):
    first = pretrain(config(tmp_path, max_epochs=1))
    before = {path.name: path.read_bytes() for path in first.dir.iterdir()}
    key = next(iter(change)).replace("__", ".")
    with pytest.raises(CheckpointError, match=rf"was trained with another {key}: \w+ -> "):
        pretrain(config(tmp_path, max_epochs=2, resume_from_checkpoint=str(first.dir), **change))
    assert {path.name: path.read_bytes() for path in first.dir.iterdir()} == before


def test_going_back_leaves_the_run_that_has_gone_on(tmp_path, capsys):
    first = pretrain(config(tmp_path, max_epochs=3, checkpoint__keep_prev=True))
    before = {path.name: path.read_bytes() for path in first.dir.iterdir()}
    oldest = sorted(first.dir.glob("*ep=0.ckpt"))[0]
    again = pretrain(config(tmp_path, max_epochs=3, checkpoint__keep_prev=True, resume_from_checkpoint=str(oldest)))
    assert again.dir != first.dir and {path.name: path.read_bytes() for path in first.dir.iterdir()} == before
    assert f"resuming {oldest.name} of {first.dir}, which has gone on from there" in capsys.readouterr().out
    assert rows(again.dir) == rows(first.dir)
    old, new = load_checkpoint(first.checkpoint), load_checkpoint(again.checkpoint)
    assert identical(new["state_dict"], old["state_dict"])


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
        "devices": 2,  # a run keeps its batch on any number of them
    }
    for key, value in same.items():
        twin = config(whole.dir.parents[1], **{key.replace(".", "__"): value})
        assert not differences(config(whole.dir.parents[1]), twin), key


def test_a_run_of_another_version_is_continued_where_no_key_that_it_lacks_asks_for_anything(whole):
    old, new = plain(config(whole.dir.parents[1])), plain(config(whole.dir.parents[1]))
    del old["data"]["val_fraction"], old["skip_non_finite"], old["val_gap"]
    assert not differences(old, new) and not differences(new, old)
    new["data"]["val_fraction"] = 0.1
    assert differences(old, new) == ["data.val_fraction: - -> 0.1"]
    new["val_gap"]["enabled"] = True
    assert len(differences(old, new)) == 3, "with it, the other keys of its section count"
    old, new = (plain(config(whole.dir.parents[1], backbone__kwargs=x)) for x in ({}, {"zero_init_residual": False}))
    assert differences(old, new), "an argument of another library may be on by default"


def test_auto_resume_leaves_running_runs_alone_and_refuses_what_it_cannot_continue(tmp_path, monkeypatch, caplog):
    cfg = config(tmp_path)
    folder, _ = interrupted(cfg, monkeypatch)
    base = folder.parent
    assert find_resumable(cfg, base).path.parent == folder
    lock = RunLock(folder)
    assert lock.take() and find_resumable(cfg, base) is None and "is running" in caplog.text
    lock.release()
    for checkpoint in folder.glob("*.ckpt"):
        os.utime(checkpoint, (time.time() - 1000 * 3600,) * 2)
    assert find_resumable(cfg, base).path.parent == folder, "however old it is"
    cfg.auto_resume.max_hours = 36.0
    with pytest.raises(CheckpointError, match=r"saved its last checkpoint 1000 hours ago: raise .*max_hours=36 to"):
        find_resumable(cfg, base)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.write_bytes(b"")
    cfg.auto_resume.max_hours = None
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*auto_resume.enabled=false starts anew"):
        find_resumable(cfg, base)


def test_float64_is_trained_resumed_and_evaluated(tmp_path, monkeypatch):
    double = {"precision": "64-true", "max_epochs": 2}
    whole = load_checkpoint(pretrain(config(tmp_path / "whole", **double)).checkpoint)
    folder, _ = interrupted(config(tmp_path / "cut", **double), monkeypatch)
    resumed = pretrain(config(tmp_path / "cut", **double))
    again = load_checkpoint(resumed.checkpoint)
    assert resumed.dir == folder and whole["state_dict"]["momentum_backbone.conv1.weight"].dtype == torch.float64
    for part in ("state_dict", "optimizer_states"):
        assert identical(again[part], whole[part])
    taken = {"pretrained_feature_extractor": str(folder), "precision": "64-true"}
    for cached in (False, True):
        options = {"scheduler__name": "none", "cache_features": cached, "max_epochs": 1}
        assert 0 <= linear(config(tmp_path, "linear", **options, **taken)).metrics["val_acc1"] <= 100
    knn(resolve({"precision": "64-true", **run_values(folder, "knn")}, "knn"))
    assert {result["protocol"]["precision"] for result in Run(folder).evaluations["knn.json"]} == {"64-true"}
