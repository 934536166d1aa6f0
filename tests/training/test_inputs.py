"""What is logged of the views and the batch, against sums over single pixels, and the warnings of `check.enabled`."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.runs.reference import Reference
from solo_ext.runs.run import Run, find_runs
from solo_ext.training.callbacks.inputs import Views
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

DEMO = ROOT / "scripts" / "pretrain" / "fashion_mnist_mini"


def deviation(values, degrees):
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - degrees))


def test_the_statistics_of_views_are_those_of_their_pixels():
    views = [torch.randn(3, 3, 4, 5) * (i + 1) + i for i in range(3)]  # the last is a small crop
    found = Views(large_crops=2)(SimpleNamespace(views=views))
    pixels = {}
    for v, image, channel, y, x in itertools.product(range(2), range(3), range(3), range(4), range(5)):
        pixels[v, image, channel, y, x] = views[v][image, channel, y, x].item()
    images = [[p for (v, i, *_), p in pixels.items() if (v, i) == one] for one in itertools.product(range(2), range(3))]
    steps = [abs(pixels[v, i, c, y, x + 1] - p) for (v, i, c, y, x), p in pixels.items() if x < 4]
    places = {(v, i, y, x) for v, i, _, y, x in pixels}
    colours = [deviation([pixels[v, i, c, y, x] for c in range(3)], 0) for v, i, y, x in places]
    want = {
        "view_mean": sum(pixels.values()) / len(pixels),
        "view_std": deviation([*pixels.values()], 1),
        "view_brightness": deviation([sum(image) / len(image) for image in images], 1),
        "view_detail": sum(steps) / len(steps),
        "view_colour": sum(colours) / len(colours),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(want, rel=1e-5)


def run(folder, *overrides, seed=0):
    quiet = [f"checkpoint.dir={folder}", "checkpoint.enabled=false", "enable_progress_bar=false", "accelerator=cpu"]
    tiny = ["data.fraction=0.05", "optimizer.batch_size=50", "max_epochs=2", "knn_eval.enabled=false", f"seed={seed}"]
    return pretrain(resolve(compose(DEMO, "byol", [*quiet, *tiny, *overrides])))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for seed in range(3):
        run(folder / "runs", seed=seed)
    path = folder / "byol.json"
    path.write_text(Reference.of("tiny/byol", find_runs(folder / "runs")).text)
    return path


def test_a_run_tells_what_departs_while_it_trains(tmp_path, reference, caplog):
    own = ["check.enabled=true", f"check.reference={reference}"]
    run(tmp_path / "honest", *own, seed=9)
    assert not [line for line in caplog.messages if line.startswith("check")]
    result = run(tmp_path / "off", *own, "optimizer.lr=0.1", seed=9)
    told = [line for line in caplog.messages if line.startswith("check")]
    assert told[0] == "check: tiny/byol: optimizer.lr: 0.008 -> 0.1"
    assert told[1].startswith("check: tiny/byol: lr from epoch 1: ") and len({*told}) == len(told)
    assert Run(result.dir).last("bn_images") == 50


def test_a_run_without_a_reference_is_refused_before_it_begins(tmp_path):
    with pytest.raises(
        ConfigError, match="there is no reference of byol resnet10_w16 fashion_mnist_mini over 2 epochs"
    ):
        run(tmp_path / "run", "check.enabled=true")
    with pytest.raises(CheckpointError, match=r"there is no reference '.*none"):
        run(tmp_path / "run", "check.enabled=true", f"check.reference={tmp_path / 'none.json'}")
    assert not (tmp_path / "run").exists()
