"""Data sets, augmentations and loaders, against torchvision, scikit-learn and each other."""

import gzip
import hashlib
import importlib.util
import math
import os
import pickle
import re
import socket
import struct
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from PIL import Image
from sklearn.model_selection import train_test_split
from torchvision.transforms.v2.functional import pil_to_tensor

from solo_ext.data import datasets
from solo_ext.data.augmentations import (
    AugmentationConfig,
    ClassificationAugmentationConfig,
    ColorJitterConfig,
    ProbConfig,
    count_crops,
)
from solo_ext.data.datasets import DATASETS, DataConfig, dataset_info, load_dataset
from solo_ext.data.loader import EpochSampler, derive_seed
from solo_ext.data.modules import ClassificationData, PretrainData
from solo_ext.data.transforms import build_eval_transform
from solo_ext.errors import ConfigError, DataError, SoloExtError
from solo_ext.schema import build

ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
BLUR, SOLARIZE, EQUALIZE = 0.6, 0.2, 0.3


def strong(crop_size=28, num_crops=1, **changes) -> AugmentationConfig:
    """Every operation on, no two probabilities equal."""
    return AugmentationConfig(
        **{
            "color_jitter": ColorJitterConfig(0.8, 0.4, 0.3, 0.2, 0.1),
            "grayscale": ProbConfig(0.25),
            "gaussian_blur": ProbConfig(BLUR),
            "solarization": ProbConfig(SOLARIZE),
            "equalization": ProbConfig(EQUALIZE),
            "horizontal_flip": ProbConfig(0.5),
            "crop_size": crop_size,
            "num_crops": num_crops,
            **changes,
        }
    )


def pretrain(batch_size=8, augmentations=None, seed=5, **data) -> PretrainData:
    data = {"dataset": "fashion_mnist_mini", "format": "image_folder", "num_workers": 0, **data}
    return PretrainData(DataConfig(**data), augmentations or [strong(), strong()], batch_size, seed)


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def same(a, b) -> bool:
    return all(
        torch.equal(x[0], y[0]) and all(map(torch.equal, x[1], y[1])) and torch.equal(x[2], y[2])
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    """train: 3 classes of 4, 5 and 6 images, some nested; val: two of the classes; flat: 7 images."""

    def save(path, seed):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(20 + seed % 5, 24, seed).save(path)

    for c, name in enumerate(("cat", "dog", "elk")):
        for i in range(4 + c):
            save(tmp_path / "train" / name / "nmlk  "[i].strip() / f"{i}.png", 10 * c + i)
    for name in ("dog", "elk"):
        save(tmp_path / "val" / name / "0.jpg", 50)
    for i in range(7):
        save(tmp_path / "flat" / f"{i}.png", i)
    save(tmp_path / "train" / ".thumbnails" / "x.png", 0)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


# --- configuration ---------------------------------------------------------------------------------------


SOLO_LEARN_ENTRY = """
rrc: {enabled: True, crop_min_scale: 0.08, crop_max_scale: 1.0}
color_jitter: {prob: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1}
grayscale: {prob: 0.2}
gaussian_blur: {prob: 0.0}
solarization: {prob: 0.2}
equalization: {prob: 0.0}
horizontal_flip: {prob: 0.5}
crop_size: 32
num_crops: 1
"""


def test_solo_learns_keys_are_the_schema():
    node = OmegaConf.create(SOLO_LEARN_ENTRY)
    aug = build(AugmentationConfig, node)
    assert asdict(aug) == {**node, "progressive": None, "mean": None, "std": None}
    assert PretrainData(DataConfig("cifar10"), [node, aug], 8, 5).augmentations == [aug, aug]


def test_count_crops_goes_by_the_first_size():
    assert count_crops([strong(32, 2), strong(16, 6), strong(32, 1), strong(48, 1)]) == (3, 7)


@pytest.mark.parametrize(
    "keys, value",
    [
        ("color_jitter.prob", 1.5),
        ("grayscale.prob", -0.1),
        ("gaussian_blur.prob", math.nan),
        ("solarization.prob", 2),
        ("equalization.prob", 1.01),
        ("horizontal_flip.prob", -1),
        ("color_jitter.hue", 0.6),
        ("color_jitter.brightness", -0.4),
        ("color_jitter.saturation", math.inf),
        ("rrc.crop_min_scale", 0),
        ("rrc.crop_max_scale", 1.2),
        ("rrc.crop_max_scale", 0.01),
        ("crop_size", 0),
        ("num_crops", 0),
        ("std", [0.2, 0.0, 0.2]),
    ],
)
def test_bad_augmentations_are_named(keys, value):
    node = OmegaConf.create(asdict(AugmentationConfig()))
    OmegaConf.update(node, keys, value)
    reported = "rrc.crop_min_scale" if value == 0.01 else keys  # then the minimum is above the maximum
    reported = "std.1" if reported == "std" else reported
    with pytest.raises(ConfigError, match=rf"^augmentations\.1\.{re.escape(reported)} must be "):
        PretrainData(DataConfig("cifar10"), [AugmentationConfig(crop_size=32), node], 8, 5)
    with pytest.raises(ConfigError, match=rf"^augmentations\.{re.escape(reported)} must be "):
        AugmentationConfig(**node)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"dataset": "cifar11"},
            r"^data.dataset must be one of fashion_mnist_mini, .*, not 'cifar11'; did you mean 'cifar10'\?$",
        ),
        ({"dataset": "???"}, "^data.dataset is missing$"),
        ({"format": "image_foldr"}, r"^data.format must be one of auto, .*; did you mean 'image_folder'\?$"),
        ({"corrupt": "skp"}, "^data.corrupt must be one of error, skip.*; did you mean 'skip'"),
        ({"corrupt_limit": 1.5}, "^data.corrupt_limit must be a finite number from 0 to 1, not 1.5$"),
        ({"num_workers": -1}, "^data.num_workers must be a whole number of at least 0, not -1$"),
        ({"fraction": 0.0}, "^data.fraction must be "),
        ({"fraction": 1.5}, "^data.fraction must be "),
        ({"fraction": math.nan}, "^data.fraction must be "),
        (
            {"augmentations": {"crop_size": -1}},
            "^data.augmentations.crop_size must be ",
        ),
    ],
)
def test_bad_data_keys_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"dataset": "cifar10", **changes})


def test_no_augmentation_is_an_error():
    with pytest.raises(ConfigError, match=r"^augmentations: empty"):
        PretrainData(DataConfig("fashion_mnist_mini"), [], 8, 5)


# --- data sets -------------------------------------------------------------------------------------------


def test_mini_is_balanced_and_as_recorded():
    assert hashlib.sha256(datasets.MINI.read_bytes()).hexdigest() == datasets.MINI_SHA256
    assert "Zalando SE" in datasets.MINI.with_name("FASHION_MNIST_LICENSE").read_text()
    for split, each in (("train", 500), ("test", 100)):
        images = load_dataset(DataConfig("fashion_mnist_mini"), split)
        assert Counter(images.targets.tolist()) == dict.fromkeys(range(10), each)
        assert images.images.pixels.shape == (10 * each, 28, 28)
        distinct = {images.images.pixels[i].tobytes() for i in range(len(images))}
        assert len(distinct) == len(images)


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_mini_is_what_its_script_draws(tmp_path, monkeypatch):
    path = ROOT / "scripts" / "data" / "build_fashion_mnist_mini.py"
    spec = importlib.util.spec_from_file_location("build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr("sys.argv", ["build", str(ORIGINALS), "--out", str(tmp_path / "mini.npz")])
    build.main()
    with np.load(tmp_path / "mini.npz") as built, np.load(datasets.MINI) as bundled:
        assert all(np.array_equal(built[name], bundled[name]) for name in bundled.files)


def test_a_damaged_mini_is_refused(tmp_path, monkeypatch):
    damaged = bytearray(datasets.MINI.read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "mini.npz").write_bytes(damaged)
    monkeypatch.setattr(datasets, "MINI", tmp_path / "mini.npz")
    with pytest.raises(DataError, match=r"mini\.npz: not the file that solo-ext was released with"):
        pretrain().check()


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("inside, suffix", [("", ".gz"), ("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz")])
def test_fashion_mnist_from_either_layout(tmp_path, inside, suffix):
    with np.load(datasets.MINI) as mini:
        for prefix, name, n in (("train", "train", 60_000), ("t10k", "test", 10_000)):
            pixels, labels, rows = np.zeros((n, 28, 28), np.uint8), np.zeros(n, np.uint8), mini[f"{name}_rows"]
            pixels[rows], labels[rows] = mini[f"{name}_images"], mini[f"{name}_labels"]
            write_idx(tmp_path / inside / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
            write_idx(tmp_path / inside / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    data = pretrain(dataset="fashion_mnist", train_path=str(tmp_path), download=False)
    data.check()
    assert (len(data.train_set), len(data.val_set)) == (60_000, 10_000)
    write_idx(tmp_path / inside / f"t10k-labels-idx1-ubyte{suffix}", np.roll(labels, 1))  # another set's
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*: not Fashion-MNIST with its labels"):
        pretrain(dataset="fashion_mnist", train_path=str(tmp_path), download=False).check()
    path = tmp_path / inside / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path}: not a readable idx file"):
        pretrain(dataset="fashion_mnist", train_path=str(tmp_path), download=False).check()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_disk(tmp_path, monkeypatch, name):
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if name == "cifar10" else CIFAR100
    rng = np.random.default_rng(0)
    base = tmp_path / cls.base_folder
    base.mkdir()

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(cls, attribute):
            pixels = rng.integers(0, 256, (20, 3072), np.uint8)
            sums.append([file, write(file, {"data": pixels, "labels": [3] * 20, "fine_labels": [3] * 20})])
        monkeypatch.setattr(cls, attribute, sums)
    names = {"label_names": list("abcdefghij"), "fine_label_names": list("abcdefghij")}
    md5 = write(cls.meta["filename"], names)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    data = pretrain(dataset=name, train_path=str(tmp_path), download=False, augmentations=[strong(32)])
    data.check()
    assert len(data.train_set) == 20 * len(cls.train_list) and len(data.val_set) == 20
    assert next(iter(data.val_dataloader()))[1][0].shape == (8, 3, 32, 32)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_offline_without_files_is_one_sentence(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    root = tmp_path / "nowhere"
    with pytest.raises(DataError, match=f"^data.train_path: no complete files of .* in '{root}', and") as error:
        pretrain(dataset=name, train_path=str(root)).check()
    assert "\n" not in str(error.value) and not root.exists()
    with pytest.raises(DataError, match=r"and data\.download is false$"):
        pretrain(dataset=name, train_path=str(root), download=False).check()


@pytest.mark.parametrize("place", ["a.JPG", "cats/a.png"])
def test_nothing_is_downloaded_among_other_images(tmp_path, place):
    """A folder of one's own photographs under the name of a set that has a download."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    with pytest.raises(DataError, match=r"but images of another set; data\.dataset=custom, .* trains on these"):
        pretrain(dataset="cifar10", train_path=str(tmp_path)).check()
    assert [file.name for file in tmp_path.iterdir()] == [place.split("/")[0]]


def test_dataset_info_needs_no_data():
    facts = {name: dataset_info(DataConfig(name, train_path="/nowhere")) for name in DATASETS}
    classes = {"fashion_mnist": 10, "stl10": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100, "imagenet": 1000}
    assert {name: facts[name].num_classes for name in classes} == classes
    assert facts["custom"].num_classes is None
    small = {"fashion_mnist_mini", "fashion_mnist", "cifar10", "cifar100"}
    assert all(info.small_images == (name in small) for name, info in facts.items())


def test_normalisation_is_solo_learns():
    assert DATASETS["cifar10"].std == (0.2470, 0.2435, 0.2616)
    assert DATASETS["cifar100"].mean == (0.5071, 0.4865, 0.4409)
    assert DATASETS["cifar100"].std == (0.2673, 0.2564, 0.2762)
    for name, mean, std in (
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        ("cifar100", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        ("stl10", (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        transform = build_eval_transform(DATASETS[name], 32)
        assert torch.equal(transform.mean.flatten(), torch.tensor(mean))
        assert torch.equal(transform.std.flatten(), torch.tensor(std))


def test_what_images_are_normalised_with(monkeypatch):
    """A view's own mean and std, or else the dataset's: one pair for pre-training, one for evaluation."""
    own, other = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.7, 0.8, 0.9), (0.25, 0.35, 0.45))
    info = replace(DATASETS["fashion_mnist_mini"], mean=own[0], std=own[1])
    said = {"mean": other[0], "std": other[1]}

    def pairs(loader):
        return [(tuple(t.mean.flatten().tolist()), tuple(t.std.flatten().tolist())) for t in loader.dataset.transforms]

    def approx(*pairs):
        return [(pytest.approx(mean), pytest.approx(std)) for mean, std in pairs]

    monkeypatch.setitem(DATASETS, "fashion_mnist_mini", info)
    for view, pair in (({}, own), (said, other), ({"mean": other[0]}, (other[0], own[1]))):
        data = pretrain(augmentations=[strong(**view), strong(**view)])
        assert pairs(data.train_dataloader()) == approx(pair, pair)

    for evaluated in (own, other):
        for augment in (True, False):
            data = ClassificationData(DataConfig("fashion_mnist_mini", num_workers=0), 8, 5, augment)
            assert pairs(data.train_dataloader()) == pairs(data.val_dataloader()) == approx(evaluated)
            section = ClassificationAugmentationConfig(**said)
            options = DataConfig("fashion_mnist_mini", num_workers=0, augmentations=section)
            data = ClassificationData(options, 8, 5, augment)
            assert pairs(data.train_dataloader()) == pairs(data.val_dataloader()) == approx(other)
        monkeypatch.setitem(DATASETS, "fashion_mnist_mini", replace(info, eval_mean=other[0], eval_std=other[1]))


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnists_normalisation_is_its_own():
    counts = np.bincount(datasets.read_idx(ORIGINALS / "train-images-idx3-ubyte.gz").ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = np.average(values, weights=counts)
    std = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    assert (round(mean, 4), round(std, 4)) == (DATASETS["fashion_mnist"].mean[0], DATASETS["fashion_mnist"].std[0])


def test_fraction_draws_solo_learns_images(folder):
    everything = load_dataset(DataConfig("fashion_mnist_mini"), "train")
    part = load_dataset(DataConfig("fashion_mnist_mini", fraction=0.1), "train")
    assert Counter(part.targets.tolist()) == dict.fromkeys(range(10), 50)
    names = [str(i) for i in range(len(everything))]  # solo-learn splits lists of files and labels
    labels = everything.targets.tolist()
    files, _, _, _ = train_test_split(names, labels, train_size=0.1, stratify=labels, random_state=42)
    assert np.array_equal(part.images.pixels, everything.images.pixels[[int(f) for f in files]])
    assert len(load_dataset(DataConfig("fashion_mnist_mini", fraction=0.1), "test")) == 1000
    flat = str(folder / "flat")
    assert len(load_dataset(DataConfig("custom", train_path=flat, fraction=0.5), "pretrain")) == 3
    with pytest.raises(DataError, match=r"^data\.fraction: 0\.1 of 15 images cannot be drawn \(each of 3 classes"):
        load_dataset(DataConfig("custom", train_path=str(folder / "train"), fraction=0.1), "train")


# --- image folders ---------------------------------------------------------------------------------------


def custom(folder, train, batch_size=2, **data) -> PretrainData:
    return pretrain(batch_size, [strong(16, 2)], dataset="custom", train_path=str(folder / train), **data)


def test_class_folders_are_labels_as_in_torchvision(folder):
    from torchvision.datasets import ImageFolder

    data = custom(folder, "train", val_path=str(folder / "val"))
    (folder / "train" / ".thumbnails" / "x.png").unlink()
    (folder / "train" / ".thumbnails").rmdir()
    expected = ImageFolder(folder / "train")
    assert data.num_classes == dataset_info(data.data).num_classes == 3
    assert data.train_set.classes == tuple(expected.classes)
    assert data.train_set.targets.tolist() == expected.targets
    for i, (image, _) in enumerate(expected):
        assert torch.equal(data.train_set.images[i], pil_to_tensor(image))
    # the validation folder lacks a class; its labels are still the training set's
    assert data.val_set.targets.tolist() == [1, 2]
    assert [views[0].shape for _, views, _ in data.val_dataloader()] == [(2, 3, 16, 16)]
    assert custom(folder, "train").val_dataloader() == []


@pytest.mark.parametrize("train, no_labels, size", [("flat", False, 7), ("flat", True, 7), ("train", True, 15)])
def test_unlabelled_folders_have_no_classes(folder, train, no_labels, size):
    data = custom(folder, train, no_labels=no_labels, val_path=str(folder / "val"))
    data.check()
    assert len(data.train_set) == size
    assert data.num_classes == dataset_info(data.data).num_classes == 0
    assert data.val_dataloader() == [] and len(data.train_set.labelled()) == 0
    assert all((targets == -1).all() for _, _, targets in data.train_dataloader())
    with pytest.raises(DataError, match="has no labels here"):
        ClassificationData(data.data, 2, 5).check()


@pytest.mark.parametrize(
    "train, data, message",
    [
        ("nowhere", {}, r"^data\.train_path: there is no folder '.*/nowhere'$"),
        ("empty", {}, r"^data\.train_path: no image in '.*/empty' \(looked for .*\.png"),
        ("empty", {"no_labels": True}, r"^data\.train_path: no image in '.*/empty'"),
        ("flat/0.png", {}, r"^data\.train_path: not a folder, .*'.*0\.png'"),
        ("hollow", {}, r"^data\.train_path: no image in '.*/hollow/b'"),
        ("train", {"val_path": "nowhere"}, r"^data\.val_path: there is no folder '.*/nowhere'$"),
        (
            "train",
            {"val_path": "flat"},
            r"^data\.val_path: '.*/flat' has no class folders, unlike data\.train_",
        ),
        (
            "val",
            {"val_path": "train"},
            r"^data\.val_path: '.*/train' has class 'cat', unlike data\.train_",
        ),
    ],
)
def test_folders_that_cannot_work(folder, train, data, message):
    (folder / "hollow" / "a").mkdir(parents=True)
    noise(8, 8).save(folder / "hollow" / "a" / "0.png")
    (folder / "hollow" / "b").mkdir()
    if "val_path" in data:
        data = {"val_path": str(folder / data["val_path"])}
    with pytest.raises(DataError, match=message):
        custom(folder, train, **data).check()


def test_a_missing_train_path_is_named():
    with pytest.raises(DataError, match=r"^data\.train_path: missing, but dataset 'custom'"):
        pretrain(dataset="custom").check()


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    scandir = os.scandir  # root may list everything, so the refusal is made here

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"^data\.train_path: cannot read '.*/train/dog' \(Permission denied\)$"):
        custom(folder, "train").check()


def test_more_class_folders_than_the_set_has(tmp_path):
    for i in range(101):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / str(i) / "0.png")
    with pytest.raises(DataError, match="has 101 class folders, but 'imagenet100' has 100 classes"):
        pretrain(dataset="imagenet100", train_path=str(tmp_path)).check()


@pytest.mark.parametrize("damage, workers", [("truncated", 0), ("text", 0), ("empty", 0), ("truncated", 2)])
def test_a_corrupt_image_is_named(folder, damage, workers):
    path = folder / "flat" / "3.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no\nimage", "empty": b""}[damage])
    with pytest.raises(DataError) as error:
        list(custom(folder, "flat", batch_size=7, num_workers=workers).train_dataloader())
    assert str(error.value).startswith(f"{path}: not a readable image (") and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image = Image.new("I;16", (20, 10)) if mode == "I;16" else noise(20, 10).convert(mode)
    image.save(tmp_path / "0.tif")
    data = custom(tmp_path, "", batch_size=1)
    _, views, _ = next(iter(data.train_dataloader()))
    assert [view.shape for view in views] == [(1, 3, 16, 16)] * 2


# --- batches ---------------------------------------------------------------------------------------------


def test_batches_keep_the_contract():
    data = pretrain(64, [strong(28, 2), strong(14, 3)], fraction=0.1)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 500 // 64
    for indexes, views, targets in batches:
        assert indexes.dtype == targets.dtype == torch.int64 and indexes.shape == targets.shape == (64,)
        assert [tuple(view.shape) for view in views] == [(64, 3, 28, 28)] * 2 + [(64, 3, 14, 14)] * 3
        assert all(view.dtype == torch.float32 and view.is_contiguous() for view in views)
        assert targets.tolist() == data.train_set.targets[indexes].tolist()
    assert len({i for indexes, _, _ in batches for i in indexes.tolist()}) == 500 // 64 * 64
    for loader, images in ((data.val_dataloader(), data.val_set), (data.probe_dataloaders()[0], data.train_set)):
        indexes, views, targets = map(list, zip(*loader, strict=True))
        assert torch.cat(indexes).tolist() == list(range(len(images)))
        assert torch.cat(targets).tolist() == images.targets.tolist()
        pixels = torch.cat([view for (view,) in views]) * 0.3530 + 0.2860
        assert torch.allclose(pixels, torch.tensor(images.images.pixels / 255).float()[:, None], atol=1e-6)


def test_explicit_normalisation_wins():
    data = pretrain(8, [strong(mean=[0.0] * 3, std=[1.0] * 3)], fraction=0.01)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        views = next(iter(loader))[1]
        assert -1e-6 <= views[0].min() < views[0].max() <= 1 + 1e-6


@pytest.mark.parametrize("augment", [True, False])
def test_classification_batches(augment):
    config = DataConfig("fashion_mnist_mini", num_workers=0, fraction=0.02)
    data = ClassificationData(config, 32, 5, augment=augment)
    data.check()
    first, second = (torch.cat([b[0] for b in data.train_dataloader()]).tolist() for _ in range(2))
    assert first == second and len(first) == (96 if augment else 100)
    assert (first == list(range(100))) is not augment
    assert {view.shape[1:] for _, (view,), _ in data.train_dataloader()} == {(3, 28, 28)}
    assert sum(len(indexes) for indexes, _, _ in data.val_dataloader()) == 1000
    config.augmentations = ClassificationAugmentationConfig(14, [0.0] * 3, [1.0] * 3)
    view = next(iter(ClassificationData(config, 4, 5).val_dataloader()))[1][0]
    assert view.shape[2:] == (14, 14) and 0 <= view.min() < view.max() <= 1


def test_stl10s_unlabelled_images_only_pretrain(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 20), ("test", 20), ("unlabeled", 30)):
        rng.integers(0, 256, (n, 3, 96, 96), np.uint8).tofile(folder / f"{prefix}_X.bin")
        if prefix != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(folder / f"{prefix}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for attribute in ("train_list", "test_list"):
        sums = [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, sums)
    data = pretrain(8, [strong(96)], dataset="stl10", train_path=str(tmp_path), download=False)
    data.check()
    assert len(data.train_set) == 50 and data.num_classes == 10
    assert sum(len(indexes) for indexes, _, _ in data.probe_dataloaders()[0]) == 20
    linear = ClassificationData(data.data, 8, 5)
    assert len(linear.train_set) == len(linear.val_set) == 20
    assert next(iter(linear.train_dataloader()))[1][0].shape == (8, 3, 96, 96)


# --- reproducibility -------------------------------------------------------------------------------------


def epoch_of(data: PretrainData, epoch: int) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("kind, workers", [("image_folder", (0, 1, 2)), ("tensor", (0,))])
def test_views_depend_on_seed_and_epoch_only(kind, workers):
    small = {"fraction": 0.01, "format": kind}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, *others = [epoch_of(pretrain(num_workers=n, **small), 3) for n in workers]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is left alone
    assert all(same(first, other) for other in others)
    continued = pretrain(**small).train_dataloader()
    for epoch in range(4):
        continued.sampler.set_epoch(epoch)
        batches = list(continued)
    assert same(first, batches)
    assert not same(first, epoch_of(pretrain(**small), 2))
    assert not same(first, epoch_of(pretrain(seed=6, **small), 3))
    one, other = first[0][1]
    assert not torch.equal(one, other)  # the same configuration, another view


def by_index(batches) -> dict[int, torch.Tensor]:
    rows = [(i, [v[row] for v in views]) for indexes, views, _ in batches for row, i in enumerate(indexes.tolist())]
    return {i: torch.stack(views) for i, views in rows}


@pytest.mark.parametrize("kind", ["image_folder", "tensor"])
def test_a_view_depends_on_its_sample_not_on_its_batch(kind):
    views = [strong(equalization=ProbConfig(0))] * 2  # it turns a rounding into more
    few, many = (by_index(epoch_of(pretrain(n, views, fraction=0.02, format=kind), 1)) for n in (8, 20))
    assert few.keys() & many.keys()
    for i in few.keys() & many.keys():
        torch.testing.assert_close(few[i], many[i], rtol=0, atol=1e-4)


def test_both_formats_draw_the_same_views():
    views = [strong(equalization=ProbConfig(0), solarization=ProbConfig(0))] * 2
    files, resident = (
        by_index(epoch_of(pretrain(16, views, fraction=0.02, format=kind), 2)) for kind in ("image_folder", "tensor")
    )
    assert files.keys() == resident.keys()
    for i in files:  # but for the crops of image_folder, which are rounded to 8 bits
        assert (files[i] - resident[i]).abs().max() < 3 / 255 / 0.353


def test_no_two_samples_of_an_epoch_share_a_seed():
    assert len({derive_seed(5, 2, i) for i in range(100_000)}) == 100_000


class Recorder(pl.LightningModule):
    """Notes the samples and a checksum of the views of each step; saves and stops at `stop`."""

    def __init__(self, stop: int | None = None, path: Path | None = None):
        super().__init__()
        self.layer, self.stop, self.path, self.seen = torch.nn.Linear(1, 1), stop, path, []

    def training_step(self, batch, batch_idx):
        indexes, views, _ = batch
        self.seen.append((self.current_epoch, batch_idx, indexes.tolist(), [v.double().sum().item() for v in views]))
        return self.layer(torch.ones(1)).sum()

    def on_train_batch_end(self, *args):
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = True
            raise KeyboardInterrupt

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def record(model: Recorder, kind: str, workers: int, ckpt_path=None, **options) -> list:
    trainer = pl.Trainer(
        **options,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    data = pretrain(16, fraction=0.02, format=kind, num_workers=workers)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert model.global_step == model.stop
    return model.seen


@pytest.mark.parametrize("stops", [(6,), (8, 10)])  # at the end of an epoch; twice in the middle of one
@pytest.mark.parametrize("kind, workers", [("image_folder", 0), ("image_folder", 2), ("tensor", 0)])
def test_a_lightning_run_resumes_on_the_same_views(tmp_path, kind, workers, stops):
    whole = record(Recorder(), kind, 0)
    assert [(epoch, batch) for epoch, batch, *_ in whole] == [(e, b) for e in range(3) for b in range(6)]
    seen, path = [], None
    for leg, stop in enumerate((*stops, None)):
        saved = tmp_path / f"{leg}.ckpt"
        seen += record(Recorder(stop, saved), kind, workers, path)
        path = saved
    assert seen == whole


@pytest.mark.parametrize("kind", ["image_folder", "tensor"])
def test_overfit_batches_repeats_the_first_ones(kind):
    seen = record(Recorder(), kind, 0, overfit_batches=2)
    assert [(epoch, batch) for epoch, batch, *_ in seen] == [(e, b) for e in range(3) for b in range(2)]
    assert {tuple(rows) for _, _, rows, _ in seen} == {tuple(range(16)), tuple(range(16, 32))}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [24, 25, 26, 27])
def test_shards_cover_an_epoch_once(world_size, size):
    orders = []
    for epoch in (0, 1):
        shards = []
        for rank in range(world_size):
            sampler = EpochSampler(size, 5, world_size, rank)
            sampler.set_epoch(epoch)
            shards.append(list(sampler))
        assert {len(shard) for shard in shards} == {len(sampler)} == {size // world_size}
        assert {e for shard in shards for e, _ in shard} == {epoch}
        taken = [i for shard in shards for _, i in shard]
        assert len(set(taken)) == len(taken) == size // world_size * world_size
        # step by step, the ranks together see one global order
        orders.append([i for step in zip(*shards, strict=True) for _, i in step])
        alone = EpochSampler(size, 5)
        alone.set_epoch(epoch)
        assert [i for _, i in alone][: len(taken)] == orders[-1]
    assert orders[0] != orders[1]


def test_neighbouring_seeds_share_no_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        return [i for _, i in sampler]

    assert order(5, 1) != order(6, 0)


def test_loaders_follow_the_trainer():
    shares = []
    for rank in (0, 1):
        data = pretrain(10, fraction=0.01)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        data.check()
        shares += [i for indexes, _, _ in data.train_dataloader() for i in indexes.tolist()]
    assert len(set(shares)) == 40


@pytest.mark.parametrize(
    "batch_size, world_size, largest, devices",
    [(51, 1, 50, "1 device"), (26, 2, 25, "each of 2 devices"), (13, 4, 12, "each of 4 devices")],
)
def test_a_batch_larger_than_the_set_is_refused(batch_size, world_size, largest, devices):
    pretrain(largest, fraction=0.01).check(world_size)
    with pytest.raises(ConfigError) as error:
        pretrain(batch_size, fraction=0.01).check(world_size)
    assert str(error.value) == (
        f"optimizer.batch_size: {batch_size} images on {devices} are more than the 50 training images of "
        f"'fashion_mnist_mini' allow; optimizer.batch_size={largest} fits"
    )


def test_every_error_is_a_users():
    assert issubclass(DataError, SoloExtError) and issubclass(ConfigError, SoloExtError)


def test_the_seed_decides_order_and_views():
    """Each apart: of the same images, another seed makes other views in another order, and the same one the same."""

    def epoch(seed):
        data = PretrainData(
            DataConfig("fashion_mnist_mini", fraction=0.02, num_workers=0), [strong(num_crops=2)], 8, seed
        )
        batches = list(data.train_dataloader())
        indexes = torch.cat([indexes for indexes, *_ in batches])
        views = torch.cat([views[0] for _, views, _ in batches])
        return indexes.tolist(), dict(zip(indexes.tolist(), views, strict=True))

    (order, views), (again, same), (other, others) = epoch(3), epoch(3), epoch(4)
    assert order == again != other
    assert all(torch.equal(view, same[i]) for i, view in views.items())
    both = views.keys() & others.keys()
    assert len(both) > 50 and not any(torch.equal(views[i], others[i]) for i in both)
