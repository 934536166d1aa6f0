"""A dataset is one entry in one file, or in a module outside the package."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import train_test_split

import solo_ext
from solo_ext.data.datasets import DATASETS, DataConfig, DatasetInfo, dataset_info, load_dataset
from solo_ext.data.images import ArrayImages, ImageSet, stratified_rows
from solo_ext.data.modules import ClassificationData
from solo_ext.errors import ConfigError, DataError
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain

SOURCE = Path(solo_ext.__file__).parent
RECIPES = SOURCE.parent / "scripts"
# file -> the dataset that it names, and why
NAMED = {
    "cli/demo.py": "fashion_mnist_mini",  # what the demo shows is shown on the bundled images
    "runs/run.py": "custom",  # which says nothing of the images
}


def load_stripes(data: DataConfig, split: str) -> ImageSet:
    """Images of 20 px whose class is their brightness."""
    rng = np.random.default_rng(split == "test")
    labels = np.arange(96) % 3
    pixels = rng.integers(0, 60, (96, 20, 20, 3)) + 80 * labels[:, None, None, None]
    return ImageSet(ArrayImages(pixels.astype(np.uint8)), labels)


@pytest.fixture
def stripes(monkeypatch):
    info = DatasetInfo(3, (0.4,) * 3, (0.3,) * 3, load_stripes, image_size=20, small_images=True, train_size=96)
    monkeypatch.setitem(DATASETS, "stripes", info)
    return info


def config(kind: str, *overrides: str):
    common = ["data.dataset=stripes", "accelerator=cpu", "enable_progress_bar=False", "max_epochs=1"]
    common += ["optimizer.batch_size=48", "data.fraction=-1"]
    return resolve(compose(RECIPES / kind / "fashion_mnist_mini", "byol.yaml", [*common, *overrides]), kind)


def test_a_dataset_from_outside_is_trained_on_and_evaluated(tmp_path, stripes):
    folder = f"checkpoint.dir={tmp_path}"
    cfg = config(
        "pretrain", folder, "augmentations.0.crop_size=20", "method_kwargs.proj_hidden_dim=32", "knn_eval.enabled=False"
    )
    assert cfg.data.num_classes == 3
    run = pretrain(cfg)
    assert load_checkpoint(run.checkpoint)["global_step"] == 2
    encoder = {"pretrained_feature_extractor": str(run.dir), "accelerator": "cpu"}
    rows = knn(resolve({**encoder, "data": {"dataset": "stripes"}, "knn_eval": {"k": [5]}}, "knn"))
    probe = linear(config("linear", folder, f"pretrained_feature_extractor={run.dir}", "data.augmentations=null"))
    assert rows[0]["acc1"] > 50 and math.isfinite(probe.metrics["val_loss"])  # chance is 33
    with pytest.raises(ConfigError, match=r"not 'stripe'; did you mean 'stripes'\?$"):
        DataConfig("stripe")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_known_of_a_dataset_is_possible(name):
    info = dataset_info(DataConfig(name, train_path="/nowhere"))
    assert info == DATASETS[name] and all(0 < value < 1 for value in (*info.mean, *info.std))
    assert info.recipes is None or (RECIPES / "pretrain" / info.recipes).is_dir()
    assert dataset_info(DataConfig(name, no_labels=True)).num_classes == 0


def test_no_other_file_names_a_dataset():
    facts = {value for info in DATASETS.values() for value in (info.recipes, info.hub) if value}
    names = (DATASETS.keys() | facts) - {"imagenet"}  # which is a stem of the backbones, too
    for file in SOURCE.rglob("*.py"):
        place = file.relative_to(SOURCE).as_posix()
        if place != "data/datasets.py":
            texts = {node.value for node in ast.walk(ast.parse(file.read_text("utf-8"))) if type(node) is ast.Constant}
            assert texts & names <= {NAMED.get(place)}, place


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("fraction", [0.1, 0.01, 0.33, 0.5, 0.77, 0.9])
def test_fractions_are_scikit_learns(classes, fraction):
    rng = np.random.default_rng(classes)
    for count in (1000, 1237, 12_800):
        even, uneven = np.arange(count) % classes, np.minimum(rng.geometric(3 / (2 + classes), count), classes)
        for labels in (even, rng.permutation(even), uneven):
            size = int(fraction * count)
            try:
                expected, _ = train_test_split(np.arange(count), train_size=fraction, stratify=labels, random_state=42)
            except ValueError:  # which `data.fraction` says in its own words
                continue
            assert np.array_equal(stratified_rows(labels, size), expected)


def test_a_part_of_the_training_images_is_kept_out_to_validate_on(monkeypatch):
    """Disjoint, stratified, the same for pre-training and evaluation; nobody looks at the test images."""
    info = DATASETS["fashion_mnist_mini"]

    def load(data, split):
        assert split != "test"
        return info.load(data, split)

    whole = load_dataset(DataConfig("fashion_mnist_mini"), "train")
    monkeypatch.setitem(DATASETS, "fashion_mnist_mini", replace(info, load=load))
    cfg = DataConfig("fashion_mnist_mini", val_fraction=0.1)
    train, val = load_dataset(cfg, "train"), load_dataset(cfg, "test")
    assert (len(train), len(val)) == (4500, 500) and np.bincount(val.targets).tolist() == [50] * 10
    assert np.array_equal(load_dataset(cfg, "pretrain").images.pixels, train.images.pixels)
    seen = {row.tobytes() for images in (train, val) for row in images.images.pixels}
    assert seen == {row.tobytes() for row in whole.images.pixels}
    half = load_dataset(replace(cfg, fraction=0.5), "train")
    assert len(half) == 2250 and len(load_dataset(replace(cfg, fraction=0.5), "test")) == 500
    module = ClassificationData(cfg, 50, 0)
    module.check()
    assert np.array_equal(module.val_set.images.pixels, val.images.pixels)


def test_nothing_is_kept_out_of_images_without_labels(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"^data.val_fraction: the training images of 'custom' have no labels$"):
        load_dataset(DataConfig("custom", train_path=str(tmp_path), val_fraction=0.5), "pretrain")
    with pytest.raises(ConfigError, match=r"^data.val_fraction must be below 1"):
        DataConfig("custom", val_fraction=1.0)


def test_a_folder_without_val_path_can_keep_some_out(tmp_path):
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    module = ClassificationData(DataConfig("custom", train_path=str(tmp_path), val_fraction=0.2), 4, 0)
    module.check()
    assert (len(module.train_set), len(module.val_set)) == (16, 4) and module.val_set.classes == ("a", "b")
    assert not {*module.train_set.images.paths.tolist()} & {*module.val_set.images.paths.tolist()}
