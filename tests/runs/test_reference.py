"""Reference curves: their bands against an independent formula, and what `judge` says of runs that are written by hand,
so that each one departs in one way only. Trainings with faults are in tests/faults/test_off_track.py."""

import json
import math
import re
from functools import cache

import numpy as np
import pytest
from scipy import integrate, special

from solo_ext.cli.main import main
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import write_json
from solo_ext.runs.metrics import read_table, write_table
from solo_ext.runs.reference import RISK, Reference, _band, compared, find_reference, judge
from solo_ext.runs.run import ARGS, ENVIRONMENT, METRICS, RESULT, Run
from solo_ext.schema import plain
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.recipes import find

EPOCHS, STEPS, SEEDS = 26, 40, 6
NOISE = {"val_acc1": 0.5, "train_neg_cos_sim": 0.01, "gap_sim": 0.001, "train_z_std": 0.001, "view_detail": 0.001}
DATA = {
    "train": {"images": 5000, "fingerprint": "a" * 64, "classes": 10},
    "val": {"images": 1000, "fingerprint": "b" * 64, "classes": 10},
}


def curves(epoch: int) -> dict[str, float]:
    """What a run without noise logs at the end of an epoch, counted from 1."""
    share = epoch / EPOCHS
    return {
        "lr": 0.004 * (1 + math.cos(math.pi * share)) / 2,
        "tau": 1 - 0.05 * (1 + math.cos(math.pi * share)) / 2,
        "bn_images": 125.0,
        "view_mean": 0.2,
        "view_detail": 0.196,
        "val_acc1": 80 * share**0.3,
        "train_neg_cos_sim": 1.5 - share,
        "train_class_loss": 2 - share,
        "gap_sim": 0.9 + 0.09 * share,
        "train_z_std": 0.08,
        "weight_distance/conv1": 0.02,
        "weight_distance/block1": 0.04,
        "images_per_s": 1000.0,
    }


@cache
def configuration(*overrides: str) -> dict:
    file = find("fashion_mnist_mini/byol")
    return plain(resolve(compose(file.parent, file.name, [f"max_epochs={EPOCHS}", *overrides])))


@pytest.fixture
def write(tmp_path):
    def write(name, seed=0, epochs=EPOCHS, change=lambda epoch, values: {}, data=DATA, overrides=(), version="0.1.0"):
        """A run folder; `change` gives what it logs otherwise at the end of an epoch."""
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / ARGS, configuration(*overrides) | {"seed": seed, "checkpoint": {"dir": f"/of/{name}"}})
        packages = {"solo-ext": version, "torch": "2.14.1"}
        write_json(folder / ENVIRONMENT, {"packages": packages, "data": data, "command": []})
        noise = np.random.default_rng(seed)
        level = {key: scale * noise.normal() for key, scale in NOISE.items()}  # a seed is good or bad for long
        rows = []
        for epoch in range(1, epochs + 1):
            values = curves(epoch)
            values |= {key: values[key] + level[key] + NOISE[key] * noise.normal() / 2 for key in NOISE}
            changed = change(epoch, values)
            rows.append({"epoch": epoch - 1, "step": changed.pop("steps", STEPS) * epoch - 1, **values, **changed})
        write_table(folder / METRICS, list(rows[0]), rows)
        if epochs == EPOCHS:
            write_json(folder / RESULT, {"seconds": 1.0})
        return Run(folder)

    return write


@pytest.fixture
def reference(write):
    return Reference.of("mini/byol", [write(f"seed{seed}", seed) for seed in range(SEEDS)])


# The band.


def student_cdf(t: float, dof: int) -> float:
    norm = special.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * special.gamma(dof / 2))
    return 0.5 + norm * integrate.quad(lambda x: (1 + x * x / dof) ** (-(dof + 1) / 2), 0, t)[0]


def test_the_band_is_a_prediction_interval_of_a_pooled_variance():
    values = np.random.default_rng(0).normal(5, [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]] * 4)  # [seeds, epochs]
    mean, band = _band(values)
    for i in range(7):
        near = [j for j in range(7) if abs(i - j) <= 2]
        centre = sum(values[:, i]) / 4
        variances = [sum((x - sum(values[:, j]) / 4) ** 2 for x in values[:, j]) / 3 for j in near]
        # the mean of the logarithm of chi squared / 3, by its density
        density = integrate.quad(lambda x: math.log(x / 3) * x**0.5 * math.exp(-x / 2), 0, math.inf)[0]
        bias = density / (2**1.5 * special.gamma(1.5))
        pooled = math.prod(variances) ** (1 / len(near)) * math.exp(-bias)
        t = (band[i] - 1e-3 * max(abs(values.mean(0)))) / math.sqrt(pooled * (1 + 1 / 4))
        assert mean[i] == pytest.approx(centre)
        assert 1 - student_cdf(t, 6) == pytest.approx(RISK, rel=1e-3)


def test_a_band_jumps_over_epochs_without_a_value():
    values = np.full((3, 6), np.nan)
    values[:, [1, 3, 5]] = [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    mean, band = _band(values)
    assert mean[[1, 3, 5]].tolist() == [2, 4, 6] and np.isnan(mean[[0, 2, 4]]).all()
    assert np.isfinite(band[[1, 3, 5]]).all() and np.isnan(band[[0, 2, 4]]).all()


def test_hardly_any_further_seed_is_off_track(write, reference):
    """Of 200, with deviations that last as long as the run does."""
    alarms = [seed for seed in range(100, 300) if not judge(write(f"more{seed}", seed), reference).on_track]
    assert len(alarms) <= 2


# What departs.


def scaled(name, factor, since=1):
    return lambda epoch, values: {name: values[name] * factor} if epoch >= since else {}


@pytest.mark.parametrize(
    "change, curve, epoch, cause",
    [
        (scaled("lr", 2), "lr", 1, "; 2 times the recipe's after scaling"),
        (lambda epoch, _: {"lr": 1e-3 * epoch} if epoch < 4 else {}, "lr", 1, "; another warm-up"),
        (lambda epoch, _: {"lr": 4e-3 * (1 - epoch / 26)}, "lr", 1, "; another schedule"),
        (scaled("tau", 0.99), "1 - tau", 1, "another momentum of the teacher"),
        (lambda epoch, values: {"tau": 1 - 1.01 * (1 - values["tau"])}, "1 - tau", 1, "another schedule of it"),
        (scaled("view_detail", 0.7), "view_detail", 1, "blurred, cropped or resized"),
        (scaled("view_mean", 1.5), "view_mean", 1, "normalised, solarized or cropped"),
        (lambda *_: {"bn_images": 62}, "bn_images", 1, "BatchNorm of another batch"),
        (lambda *_: {"steps": 20}, "steps", 1, "another number of images"),
        (scaled("train_neg_cos_sim", 0.5, since=10), "train_neg_cos_sim", 10, "another loss"),
        (scaled("train_z_std", 0.1, since=20), "train_z_std", 20, "towards 0 they collapse"),
        (lambda *_: {"weight_distance/conv1": 0.3}, "weight_distance", 1, "the teacher follows"),
        (scaled("gap_sim", 0.5, since=12), "gap_sim", 12, "its update or its stages"),
        (lambda *_: {"val_acc1": 10.0}, "val_acc1", 1, "the labels do not belong to the images"),
        (lambda *_: {"train_class_loss": 2.3}, "train_class_loss", 1, "the labels do not belong to the images"),
    ],
)
def test_what_departs_first_is_named_with_its_cause(write, reference, change, curve, epoch, cause):
    verdict = judge(write("off", 9, change=change), reference)
    first = verdict.departures[0]
    assert (first.curve, first.epoch) == (curve, epoch) and cause in str(first)
    assert not verdict.on_track and len(verdict.departures) == 1


def test_what_goes_in_comes_before_what_follows_from_it(write, reference):
    """Also where that departs by far more, in the same epoch; then what departs earlier, and then by more."""
    both = lambda epoch, values: {  # noqa: E731
        "val_acc1": 0.0, "train_z_std": 5.0, "lr": 1.1 * values["lr"], "tau": 0.5 if epoch > 3 else values["tau"]
    }  # fmt: skip
    names = [departure.curve for departure in judge(write("off", 9, change=both), reference).departures]
    assert names == ["lr", "train_z_std", "val_acc1", "1 - tau"]


def test_one_bad_epoch_is_no_departure_unless_it_is_far_off(write, reference):
    width = dict(zip(reference.epochs, reference.curves["val_acc1"][1], strict=True))[10]
    for factor, names in ((1.5, []), (5, ["val_acc1"])):
        value = 80 * (10 / EPOCHS) ** 0.3 + factor * width
        run = write(f"off{factor}", 9, change=lambda epoch, _, value=value: {"val_acc1": value} if epoch == 10 else {})
        assert [departure.curve for departure in judge(run, reference).departures] == names


def test_a_run_under_way_is_judged_by_the_epochs_that_it_has(write, reference):
    half = write("half", 9, epochs=14)
    verdict = judge(half, reference)
    assert verdict.on_track and verdict.epochs == 14
    late = scaled("gap_sim", 0.5, since=20)
    assert judge(write("early", 9, epochs=15, change=late), reference).on_track
    assert not judge(write("later", 9, epochs=25, change=late), reference).on_track


def test_an_epoch_that_is_not_over_is_left_out(write, reference):
    run = write("under way", 9, epochs=3)
    columns, rows = read_table(run.dir / METRICS)
    started = {"epoch": 3, "step": 3 * STEPS + 4, "lr": 1.0}  # not a departure: the epoch's mean is another one
    write_table(run.dir / METRICS, columns, [*rows, started])
    verdict = judge(Run(run.dir), reference)
    assert verdict.on_track and verdict.epochs == 3


def test_one_epoch_is_too_few_for_all_but_what_goes_in(write, reference):
    wrong = lambda *_: {"val_acc1": 0.0, "train_z_std": 5.0}  # noqa: E731
    verdict = judge(write("short", 9, epochs=1, change=wrong), reference)
    assert verdict.on_track and "too short to judge the curves, but for what goes in: it has 1 epoch of" in str(verdict)
    verdict = judge(write("short2", 9, epochs=1, change=scaled("lr", 2)), reference)
    [departure] = verdict.departures
    assert (
        departure.curve == "lr" and departure.cause == "2 times the recipe's after scaling so far, or another warm-up"
    )


def test_what_is_configured_otherwise_is_named(write, reference):
    run = write("off", 9, overrides=["optimizer.lr=0.5", "momentum.base_tau=0.9"])
    assert judge(run, reference).asked == ["momentum.base_tau: 0.95 -> 0.9", "optimizer.lr: 0.008 -> 0.5"]
    for free in ("knn_eval.every=2", "data.num_workers=0", "gap.every=5", "name=mine"):
        assert judge(write(free.partition("=")[0], 9, overrides=[free]), reference).on_track


def test_devices_may_share_the_batch(write, reference):
    two = ["devices=2", "strategy=ddp", "accelerator=cpu"]
    run = write("two", 9, overrides=["optimizer.batch_size=62", *two])
    assert judge(run, reference).asked == ["optimizer.batch_size: 125 -> 124"]


def test_other_images_are_named(write, reference):
    half = DATA | {"train": {"images": 2500, "fingerprint": "c" * 64}}
    assert judge(write("half", 9, data=half), reference).asked == ["train images: number 5000 -> 2500"]
    other = DATA | {"val": DATA["val"] | {"fingerprint": "c" * 64}}
    asked = judge(write("other", 9, data=other), reference).asked
    assert asked == ["val images: names or labels bbbbbbbbbbbb -> cccccccccccc"]


def test_another_precision_is_said(write, reference):
    verdict = judge(write("wide", 9, overrides=["precision=32-true"]), reference)
    assert verdict.on_track and verdict.remarks == ["precision: bf16-mixed -> 32-true"]


def test_another_version_is_said(write, reference):
    verdict = judge(write("newer", 9, version="0.2.0"), reference)
    assert verdict.on_track and verdict.remarks == ["the reference is of solo-ext 0.1.0, the run of 0.2.0"]
    assert judge(write("patch", 9, version="0.1.7"), reference).remarks == []


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["max_epochs=20"], "max_epochs 20, but the reference mini/byol 26"),
        (["backbone.name=resnet18"], "backbone.name resnet18, but the reference mini/byol resnet10_w16"),
        (["method=res_byol", "intra.weight=1"], "method res_byol, but the reference mini/byol byol"),
    ],
)
def test_another_recipes_reference_is_refused(write, reference, overrides, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        judge(write("other", 9, overrides=overrides), reference)


# The files.


def test_a_reference_is_a_few_kb_without_anything_of_the_machine(reference, tmp_path):
    path = tmp_path / "reference.json"
    path.write_text(reference.text)
    assert Reference.read(path) == reference
    assert path.stat().st_size < 8_000 and "/of/" not in reference.text
    assert "images_per_s" not in reference.curves and reference.epochs == [1, 2, 3, 4, 5, *range(6, 27, 2)]
    assert reference.curves["weight_distance"][0][0] == pytest.approx(0.03)  # the mean of its stages


def test_a_damaged_reference_is_refused(reference, tmp_path):
    path = tmp_path / "reference.json"
    with pytest.raises(CheckpointError, match="there is no reference"):
        Reference.read(path)
    content = json.loads(reference.text)
    texts = ["{", "[]", "{}", json.dumps(content | {"more": 1}), json.dumps(content | {"curves": {"lr": "x"}})]
    texts += [json.dumps(content | {"curves": {"lr": [[1.0]]}}), json.dumps(content | {"epochs": "x"})]
    for text in texts:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"reference\.json is "):
            Reference.read(path)


def test_a_reference_is_of_finished_runs_of_one_recipe(write):
    runs = [write(f"seed{seed}", seed) for seed in range(2)]
    with pytest.raises(ConfigError, match=r"at least 3 runs, each with another seed, not seeds \[0, 1\]"):
        Reference.of("x", runs)
    with pytest.raises(ConfigError, match=r"not seeds \[0, 1\]"):
        Reference.of("x", [*runs, write("again", 1)])
    with pytest.raises(ConfigError, match="half has not ended"):
        Reference.of("x", [*runs, write("half", 2, epochs=15)])
    with pytest.raises(ConfigError, match=r"differs from .*seed0 in more than the seed: optimizer\.lr: 0\.008 -> 1\.0"):
        Reference.of("x", [*runs, write("other", 2, overrides=["optimizer.lr=1.0"])])
    fewer = DATA | {"train": {"images": 10, "fingerprint": "c" * 64}}
    with pytest.raises(ConfigError, match="in more than the seed: train images: number 5000 -> 10"):
        Reference.of("x", [*runs, write("fewer", 2, data=fewer)])


def zoo(folder, *references):
    folder.mkdir()
    (folder / "index.yaml").write_text("entries: []")
    for reference in references:
        path = folder / "references" / f"{reference.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reference.text)
    return folder


def test_the_nearest_reference_is_found(write, reference, tmp_path):
    runs = [write(f"tau{seed}", seed, overrides=["momentum.base_tau=0.9"]) for seed in range(3)]
    folder = zoo(tmp_path / "zoo", reference, Reference.of("mini/tau", runs))
    assert find_reference(compared(runs[0]), [folder]).name == "mini/tau"
    assert find_reference(compared(write("own", 9)), [folder]).name == "mini/byol"
    assert find_reference(compared(write("lr", 9, overrides=["optimizer.lr=1"])), [folder]).name == "mini/byol"
    with pytest.raises(ConfigError, match=r"no reference of byol resnet10_w16 .* over 20 epochs: that one has 26"):
        find_reference(compared(write("short", 9, overrides=["max_epochs=20"])), [folder])
    with pytest.raises(ConfigError, match=r"no reference of byol resnet18 .* over 26 epochs"):
        find_reference(compared(write("wide", 9, overrides=["backbone.name=resnet18"])), [folder])


def test_the_commands(write, tmp_path, capsys, monkeypatch):
    folder = zoo(tmp_path / "zoo")
    runs = [str(write(f"seed{seed}", seed).dir) for seed in range(SEEDS)]
    assert main(["zoo", "reference", *runs, "--zoo", str(folder)]) == 2
    assert "--name is missing" in capsys.readouterr().err and not (folder / "references").exists()
    assert main(["zoo", "reference", *runs, "--zoo", str(folder), "--name", "../x"]) == 2
    assert main(["zoo", "reference", *runs, "--zoo", str(folder), "--name", "mini/byol"]) == 0
    file = folder / "references" / "mini" / "byol.json"
    assert capsys.readouterr().out == f"{file}\n"
    own, off = str(write("own", 9).dir), str(write("off", 9, change=scaled("lr", 2)).dir)
    assert main(["check", own, "--reference", str(file)]) == 0
    assert "on track: 12 curves keep within their bands" in capsys.readouterr().out
    monkeypatch.setenv("SOLO_EXT_ZOO", str(folder))
    with pytest.raises(SystemExit, match="1"):
        main(["check", off])
    out = capsys.readouterr().out
    assert "against mini/byol (6 seeds, 26 epochs), up to epoch 26:" in out and "  first: lr from epoch 1: " in out
    assert main(["check", str(tmp_path / "runs")]) == 2
    assert f"holds {SEEDS + 2} runs; name one of them" in capsys.readouterr().err
    assert main(["check", own, "--reference", str(tmp_path / "none.json")]) == 2
    assert "there is no reference" in capsys.readouterr().err
