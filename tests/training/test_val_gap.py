"""The gap on validation images, against cosines by hand of the student's and the teacher's outputs."""

import subprocess
import sys
from pathlib import Path

import formulas
import pytest
import torch
from conftest import build, fit, random_batches
from tiny_runs import config, pretrain, rows

from solo_ext.errors import ConfigError
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint
from solo_ext.runs.run import Run
from solo_ext.training.callbacks.val_gap import ValidationGap, ValidationGapConfig
from solo_ext.training.metrics import metric_of

IMAGES, COPIES, CLASSES = 9, 2, 4
ON = {"val_gap__enabled": True, "val_gap__per_class": True, "limit_val_batches": 1.0}


def validation():
    """Images and labels: one has none, nor have the copies that fill up a process's share."""
    images = torch.randn(IMAGES + COPIES, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(len(images)) % CLASSES
    labels[5], labels[IMAGES:] = -1, -1
    return images, labels


def trained(method="byol", precision="32-true", per_class=True, **changes):
    """A method whose teacher has stayed behind its student, in eval mode, and what its validation has logged."""
    model = build(method, **{"optimizer__lr": 0.3, **changes})
    parts = zip(*(x.split(8) for x in (torch.arange(IMAGES + COPIES), *validation())), strict=True)
    monitor = ValidationGap(ValidationGapConfig(enabled=True, per_class=per_class), IMAGES)
    val = [(indexes, [view], labels) for indexes, view, labels in parts]
    trainer = fit(model, random_batches(3), callbacks=[monitor], val=val, precision=precision)
    return model.eval(), gaps({name: float(x) for name, x in trainer.callback_metrics.items()})


def gaps(row):
    return {name: x for name, x in row.items() if name.startswith("val_gap") or "val_acc1/" in name}


@torch.no_grad()
def outputs(model, images, prefix=""):
    found = {}
    for part in ("backbone", "projector", "predictor"):
        found[part] = images = getattr(model, prefix + part)(images)
    return found


def similarities(ours, theirs, labels):
    """'' or /<class> -> the mean cosine over all images, the copies left out, or over those of the class."""
    groups = {"": torch.arange(len(labels)) < IMAGES} | {f"/{c}": labels == c for c in range(CLASSES)}
    return {
        end: -float(formulas.negative_cosine(ours[some].double(), theirs[some].double()))
        for end, some in groups.items()
    }


def test_of_every_image_once_and_of_each_class():
    model, row = trained(gap__at="predictor", momentum__classifier=True)
    images, labels = validation()
    ours, theirs = outputs(model, images), outputs(model, images, "momentum_")
    expected = {}
    for part, name in (("backbone", "feats"), ("projector", "z"), ("predictor", "q")):
        found = similarities(ours[part], theirs[part], labels)
        assert found[""] < 0.9999, "or nothing could be told apart"
        expected |= {f"val_gap_sim_{name}{end}": value for end, value in found.items()}
    for prefix, out in (("", ours), ("momentum_", theirs)):
        guesses = getattr(model, f"{prefix}classifier")(out["backbone"]).argmax(1)
        for c in range(CLASSES):
            hits = [int(guess) == c for guess, label in zip(guesses, labels, strict=True) if label == c]
            expected[f"{prefix}val_acc1/{c}"] = 100 * sum(hits) / len(hits)
    assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stages", ["projector", ["block4", "projector"]])
def test_a_teacher_that_goes_on_from_the_student(stages):
    """Features that are the student's own have no gap, nor has a predictor that nobody reads."""
    model, row = trained(per_class=False, momentum__stages=stages)
    images, labels = validation()
    ours, expected = outputs(model, images), {}
    taught = ours["backbone"]
    with torch.no_grad():
        if stages != "projector":
            net = model.backbone
            h = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
            taught = model.momentum_backbone.layer4(net.layer3(net.layer2(h))).mean((2, 3))
            expected["val_gap_sim_feats"] = similarities(ours["backbone"], taught, labels)[""]
        theirs = model.momentum_projector(taught)
    expected["val_gap_sim_z"] = similarities(ours["projector"], theirs, labels)[""]
    assert row == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_there_are_accuracies_only():
    row = trained("simclr")[1]
    assert row.keys() == {f"val_acc1/{c}" for c in range(CLASSES)}


def test_the_teacher_runs_in_the_precision_of_the_student():
    """The student has not moved; a teacher in float32 would be 1e-5 away."""
    still = {"optimizer__lr": 1e-12, "scheduler__warmup_start_lr": 0.0}
    row = trained(precision="bf16-mixed", per_class=False, **still)[1]
    assert set(row) == {"val_gap_sim_feats", "val_gap_sim_z"}
    assert row == pytest.approx(dict.fromkeys(row, 1.0), abs=1e-6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Runs without the monitor and with it, in every second epoch of three."""
    folder = tmp_path_factory.mktemp("pair")
    off, on = {"limit_val_batches": 1.0}, {**ON, "val_gap__every": 2}
    changes = {"momentum__classifier": True, "knn_eval__enabled": False}
    return [
        (pretrain(config(folder / str(len(how)), **changes, **how)).dir, torch.get_rng_state()) for how in (off, on)
    ]


def test_a_training_is_left_alone(pair):
    """Weights, buffers, optimizer, random state, and all that is logged beside."""
    runs, randoms = zip(*pair, strict=True)
    old, new = (load_checkpoint(find_checkpoint(run)) for run in runs)
    torch.testing.assert_close(new["state_dict"], old["state_dict"], rtol=0, atol=0)
    states = [content["optimizer_states"][0]["state"] for content in (new, old)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[0] and torch.equal(*randoms)
    without, watched = map(rows, runs)
    own = gaps(watched[0])
    assert own and not gaps(without[0])
    assert [{k: x for k, x in row.items() if k not in own} for row in watched] == without


def test_every_few_epochs_and_in_the_last(pair):
    watched = [{k: x for k, x in row.items() if x} for row in rows(pair[1][0])]
    epochs = [int(row["epoch"]) for row in watched if "val_gap_sim_z" in row]
    assert epochs == [1, 2] and not Run(pair[0][0]).args["val_gap"]["enabled"]
    accuracies = [float(x) for name, x in watched[-1].items() if name.startswith("momentum_val_acc1/")]
    # the bundled set has as many images of each class
    assert sum(accuracies) / len(accuracies) == pytest.approx(float(watched[-1]["momentum_val_acc1"]), abs=1e-3)


@pytest.mark.slow
def test_two_processes_count_as_one_does(tmp_path):
    """Each with a share of 101 images, one filled up."""
    common = {**ON, "data__val_fraction": 0.0202, "precision": "64-true", "max_epochs": 1, "gap__at": "predictor"}
    one = pretrain(config(tmp_path / "one", **common)).dir
    two = {"devices": 2, "strategy": "ddp", "sync_batchnorm": True, "optimizer__batch_size": 8}
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
        "from tiny_runs import config, pretrain\n"
        f"pretrain(config({str(tmp_path / 'two')!r}, **{common | two}))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [other] = (tmp_path / "two" / "byol").iterdir()
    found, expected = ({name: float(x) for name, x in gaps(rows(run)[-1]).items()} for run in (other, one))
    assert found == pytest.approx(expected, rel=1e-5) and found["val_gap_sim_q"] < 0.9999
    assert len(found) == 3 + 10 * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_gap__every": 0}, r"val_gap\.every must be a whole number of at least 1, not 0"),
        ({"data__no_labels": True}, r"val_gap\.enabled: there are no images to validate on, which takes labels"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        pretrain(config(tmp_path, val_gap__enabled=True, **changes))


def test_classes_need_labels():
    with pytest.raises(ConfigError, match=r"val_gap\.per_class must be false where the images have no labels"):
        trained(data__num_classes=0)


def test_a_report_knows_them():
    assert metric_of("val_gap_sim_q").section == "gap" and metric_of("val_gap_sim_q").progress
    assert metric_of("val_gap_sim_z/3").title == "Projector's outputs, class 3"
    assert metric_of("momentum_val_acc1/7").section == metric_of("val_acc1/7").section == "accuracy by class"
