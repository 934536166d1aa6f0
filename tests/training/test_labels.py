"""What is trained with labels: a grid of learning rates in one pass, fine-tuning, few labels, other datasets."""

import hashlib
import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import whole  # noqa: F401, a fixture

from solo_ext.analysis.report import main_report
from solo_ext.cli.main import main
from solo_ext.data import subsets
from solo_ext.data.datasets import FOLDER, DataConfig, load_dataset
from solo_ext.errors import ConfigError, DataError
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint, open_checkpoint
from solo_ext.runs.run import LINEAR, Run
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import linear

SHORT = ["max_epochs=2", "optimizer.batch_size=16", "data.num_workers=0", "accelerator=cpu", "data.fraction=0.02"]


def evaluated(run, tmp_path, *overrides, schedule="step"):
    words = [*SHORT, f"checkpoint.dir={tmp_path}", "auto_resume.enabled=false", *overrides]
    words += ["scheduler.lr_decay_steps=[1]"] if schedule == "step" else ["scheduler.name=warmup_cosine"]
    return linear(resolve(run_values(run.dir, "linear", words), "linear"), tmp_path / "results")


GRID = {"lr_grid": [0.03, 4.0], "weight_decay_grid": [0.0, 0.1]}


def points(metrics):
    """Of each point of `GRID`: its classifier, how its metrics' names end, and the overrides that are it alone."""
    for i, (lr, wd) in enumerate(product(*GRID.values())):
        alone = [f"optimizer.lr={lr}", f"optimizer.weight_decay={wd}"]
        yield f"others.{i - 1}" if i else "classifier", f"/lr={lr:g}/wd={wd:g}", alone
    assert len({value for name, value in metrics.items() if name.startswith("val_loss")}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_grid_is_what_its_points_are_one_by_one(whole, tmp_path, optimizer):  # noqa: F811
    options = [f"optimizer.name={optimizer}", "precision=64-true"]
    grid = evaluated(whole, tmp_path, *options, *(f"{key}={x}" for key, x in GRID.items()), schedule="cosine")
    state = load_checkpoint(find_checkpoint(grid.dir))["state_dict"]
    for head, end, overrides in points(grid.metrics):
        alone = evaluated(whole, tmp_path, *options, *overrides, schedule="cosine")
        for name in ("val_loss", "val_acc1", "train_loss"):
            assert grid.metrics[f"{name}{end}"] == pytest.approx(alone.metrics[name], rel=1e-9), (end, name)
        own = load_checkpoint(find_checkpoint(alone.dir))["state_dict"]
        for part in ("weight", "bias"):
            torch.testing.assert_close(state[f"{head}.{part}"], own[f"classifier.{part}"], rtol=1e-9, atol=1e-12)


def test_a_grid_on_cached_features_is_what_its_points_are_one_by_one(whole, tmp_path, capsys):  # noqa: F811
    cached = ["cache_features=true", "keep_features=file"]
    grid = evaluated(whole, tmp_path, *cached, *(f"{key}={x}" for key, x in GRID.items()))
    said = capsys.readouterr().out
    for _, end, overrides in points(grid.metrics):
        alone = evaluated(whole, tmp_path, "cache_features=true", *overrides).metrics
        assert {name: grid.metrics[f"{name}{end}"] for name in alone} == pytest.approx(alone, rel=1e-5)
    best = max((value, name) for name, value in grid.metrics.items() if name.startswith("val_acc1"))[0]
    assert re.search(rf"best of 4: val_acc1/lr=\S+/wd=\S+\s{best:.4g}, chosen on the test images themselves", said)
    evaluated(whole, tmp_path, *cached, "lr_grid=[0.1,1]", "data.val_fraction=0.2")
    assert "chosen on training images (data.val_fraction)" in " ".join(capsys.readouterr().out.split())


def test_each_rate_of_a_grid_is_a_result_and_none_stands_for_the_run(whole, tmp_path, capsys):  # noqa: F811
    evaluated(whole, tmp_path, "cache_features=true", "lr_grid=[0.1,1]")
    alone = evaluated(whole, tmp_path, "cache_features=true", "optimizer.lr=1")
    first, second, single = Run(tmp_path / "results").evaluations[LINEAR]
    for row, lr in ((first, 0.1), (second, 1), (single, 1)):
        assert row["protocol"]["optimizer.lr"] == lr
        assert row["protocol"]["optimizer.effective_lr"] == pytest.approx(lr * 16 / 256)
    assert first["protocol"]["lr_grid"] == [0.1, 1.0] and second["acc1"] == single["acc1"] == alone.metrics["val_acc1"]
    said = capsys.readouterr().out
    assert "val_acc1/lr=0.1 " in said and "val_acc1/lr=1 " in said
    page = main_report([tmp_path / "results"], tmp_path / "report").read_text(encoding="utf-8")
    assert "optimizer.lr 0.1, " in page and "optimizer.lr 1.0, " in page, "which is which"
    run = Run(tmp_path / "results")
    run.evaluations[LINEAR] = [first, second]
    for grid in ("lr_grid", "weight_decay_grid"):
        with pytest.raises(ConfigError, match=f"{grid} must be empty with gradient_clip_val"):
            evaluated(whole, tmp_path, f"{grid}=[0.1,1]", "gradient_clip_val=1")
    assert not run.standard(LINEAR), "a rate that was chosen by its result is no evaluation by the standard protocol"


def test_fine_tuning_trains_the_encoder_by_its_own_recipe(whole, tmp_path):  # noqa: F811
    place = [f"checkpoint.dir={tmp_path}", "checkpoint.enabled=true"]
    assert main(["finetune", "--run", str(whole.dir), *SHORT, *place, "--out", str(tmp_path / "results")]) == 0
    [row] = json.loads((tmp_path / "results" / LINEAR).read_text())["results"]
    asked = {
        "finetune": True,
        "optimizer.lr": 0.05,
        "optimizer.kwargs.nesterov": True,
        "scheduler.name": "warmup_cosine",
    }
    assert asked.items() <= row["protocol"].items() and row["protocol"]["recipe"] is None
    before, after = open_checkpoint(whole.dir).state, open_checkpoint(row["run"]).state
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])


@pytest.fixture
def folder(tmp_path):
    """Photographs of two classes, three each."""
    for i in range(6):
        place = tmp_path / "images" / ("n01", "n02")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


def test_a_subset_is_the_images_that_a_file_names(folder, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("5.png\n\nn01/0.png\n3.png\n")
    data = DataConfig(FOLDER, str(folder), str(folder), subset=str(listed))
    some = load_dataset(data, "train")
    assert [name.decode() for name in some.images.paths] == ["n01/0.png", "n02/3.png", "n02/5.png"]
    assert some.targets.tolist() == [0, 1, 1] and some.classes == ("n01", "n02")
    assert len(load_dataset(data, "test")) == 6
    for text, said in (
        ("9.png\n7.png\n0.png", "2 of its 3 images are not in data.train_path .first: 9.png"),
        ("", "names no"),
    ):
        listed.write_text(text)
        with pytest.raises(DataError, match=f"data.subset: .*{said}"):
            load_dataset(data, "train")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(DataConfig(FOLDER, str(folder), subset="nowhere.txt"), "train")
    with pytest.raises(DataError, match="no files with names"):
        load_dataset(DataConfig("fashion_mnist_mini", subset="simclr_1percent"), "train")


def test_a_published_subset_is_downloaded_once_and_checked(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source := tmp_path / "list.txt").write_text("4.png\n")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    data = DataConfig(FOLDER, str(folder), subset="simclr_1percent")
    monkeypatch.setitem(subsets.PUBLISHED, "simclr_1percent", (source.as_uri(), digest))
    with pytest.raises(DataError, match=r"data\.download is false"):
        load_dataset(DataConfig(FOLDER, str(folder), subset="simclr_1percent", download=False), "train")
    assert load_dataset(data, "train").targets.tolist() == [0]
    source.unlink()
    assert len(load_dataset(data, "train")) == 1, "from the copy"
    source.write_text("5.png\n")
    (tmp_path / "datasets" / "simclr_1percent.txt").write_text("5.png\n")
    with pytest.raises(DataError, match="cannot be downloaded"):
        load_dataset(data, "train")


def test_an_encoder_is_transferred_to_another_set(whole, folder, tmp_path):  # noqa: F811
    """Gray 12 px images to photographs of other classes: linear and kNN, beside what is known of its own data."""
    other = ["data.dataset=custom", f"data.train_path={folder}", f"data.val_path={folder}", "data.num_workers=0"]
    out = ["--out", str(tmp_path / "results")]
    assert main(["knn", "--run", str(whole.dir), *other, "--k", "1", "--distance", "cosine", *out]) == 0
    words = [*other, "optimizer.batch_size=4", "max_epochs=1", f"checkpoint.dir={tmp_path}", "accelerator=cpu"]
    assert main(["linear", "--run", str(whole.dir), *words, *out]) == 0
    run = Run(tmp_path / "results")
    [knn], [trained] = run.evaluations["knn.json"], run.evaluations[LINEAR]
    assert knn["acc1"] == 100, "each image is its own neighbour"
    for row in (knn, trained):
        assert row["protocol"]["data.dataset"] == "custom" and row["protocol"]["data.train.images"] == 6
    assert not run.standard(LINEAR) and not run.knn_result(1), "they do not stand for the run on its own data"
