"""Images of more or fewer than three channels: read from files, arrays and Datasets, in every format, and augmented."""

import io
import logging
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from certificate.compare import BOUNDS
from certificate.reference import render
from PIL import Image

from solo_ext.data.augmentations import (
    AugmentationConfig,
    ClassificationAugmentationConfig,
    ColorJitterConfig,
    ProbConfig,
    RandomResizedCropConfig,
)
from solo_ext.data.datasets import DATASETS, DataConfig, load_dataset
from solo_ext.data.decode import array_pixels, decode, image_pixels
from solo_ext.data.given import give
from solo_ext.data.images import FileImages
from solo_ext.data.modules import ClassificationData, PretrainData, pick_format
from solo_ext.data.transforms import Transform
from solo_ext.data.views import DRAWS
from solo_ext.errors import ConfigError, DataError

CHANNELS, COUNT = (1, 4, 13), 6
CPU = torch.device("cpu")
ALWAYS, WHOLE = ProbConfig(1.0), RandomResizedCropConfig(enabled=False)
COLOURS = {"color_jitter": ColorJitterConfig(1.0, 0.4, 0.4, 0.4, 0.2), "grayscale": ProbConfig(0.5)}


def bands(i: int, channels: int) -> np.ndarray:
    """uint8 [24, 20, channels]: smooth, each channel of its own mean."""
    rng = np.random.default_rng(i)
    coarse = torch.from_numpy(rng.random((1, channels, 6, 5)))
    fine = torch.nn.functional.interpolate(coarse, (24, 20), mode="bicubic")[0].permute(1, 2, 0).numpy()
    levels = fine * 120 + np.arange(channels) * 120 / channels
    return levels.clip(0, 255).astype(np.uint8)


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def encoded(i: int, channels: int) -> tuple[str, bytes]:
    array = bands(i, channels)
    if channels > 4:
        return f"{i}.npy", npy(array if i % 2 else array.transpose(2, 0, 1))
    return f"{i}.png", png(array[..., 0] if channels == 1 else array)


def folder(path, channels: int, count: int = COUNT):
    for i in range(count):
        name, data = encoded(i, channels)
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (path / "ab"[i % 2] / name).write_bytes(data)
    return path


class Rows(list):
    """A Dataset of the given samples."""


@pytest.fixture
def given():
    """A function: samples -> the keys of a Dataset of them."""
    yield lambda samples: {key.removeprefix("data."): value for key, value in give(Rows(samples), None, None).items()}
    DATASETS.pop("Rows", None)


def data_of(kind: str, channels: int, tmp_path, given, **options) -> DataConfig:
    if kind == "dataset":
        samples = [
            (bands(i, channels) if i % 2 else bands(i, channels).transpose(2, 0, 1), i % 2) for i in range(COUNT)
        ]
        return DataConfig(**{"channels": channels, "num_workers": 0, **given(samples), **options})
    path = folder(tmp_path / "images", channels)
    if kind == "h5":
        from solo_ext.data.h5 import write_h5

        write_h5(path, path := tmp_path / "images.h5")
    return DataConfig("custom", str(path), channels=channels, num_workers=0, **options)


def whole(channels: int) -> Transform:
    """Which leaves an image as it is, from 0 to 255."""
    return Transform.random(AugmentationConfig(rrc=WHOLE, crop_size=20), (0.0,) * channels, (1 / 255,) * channels)


SOURCES = [("folder", "image_folder"), ("folder", "tensor"), ("dataset", "image_folder"), ("dataset", "tensor")]
SOURCES += [("h5", "h5"), ("h5", "tensor")] if find_spec("h5py") else []


@pytest.mark.parametrize("kind, format", SOURCES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_source_and_format_has_all_channels(tmp_path, given, channels, kind, format):
    data = data_of(kind, channels, tmp_path, given, format=format)
    images = load_dataset(data, "train").images
    order = [*range(COUNT)] if kind == "dataset" else [0, 2, 4, 1, 3, 5]  # class by class
    for row, i in enumerate(order):
        assert torch.equal(images[row], torch.from_numpy(bands(i, channels)).permute(2, 0, 1))
    view = AugmentationConfig(rrc=WHOLE, crop_size=20, mean=[0.0] * channels, std=[1.0] * channels)
    loader = PretrainData(data, [view], COUNT, 0).train_dataloader()
    [(indexes, [views], _)] = loader
    expected = [torch.from_numpy(bands(order[i], channels)).permute(2, 0, 1)[:, 2:22] for i in indexes.tolist()]
    torch.testing.assert_close(255 * views, torch.stack(expected).float(), rtol=0, atol=1e-3)


STRONG = AugmentationConfig(
    crop_size=16,
    gaussian_blur=ProbConfig(0.5),
    solarization=ProbConfig(0.3),
    horizontal_flip=ProbConfig(0.5),
    **COLOURS,
)


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_formats_agree(tmp_path, given, channels):
    """By the bounds that the data certificate has for views of RGB photographs."""
    views = []
    for format in ("image_folder", "tensor"):
        (tmp_path / format).mkdir()
        data = data_of("folder", channels, tmp_path / format, given, format=format)
        loader = PretrainData(data, [replace(STRONG, num_crops=8)], COUNT, 0).train_dataloader()
        [(indexes, own, _)] = loader
        std = loader.dataset.transforms[0].std[:, None, None]
        views.append(torch.stack(own)[:, indexes.argsort()] * std * 255)
    difference, bias = BOUNDS["all"]
    off = views[0] - views[1]
    assert views[0].shape == (8, COUNT, channels, 16, 16) and views[0].std() > 30
    assert off.abs().mean() <= difference and off.mean().abs() <= bias


@pytest.mark.parametrize(
    "name, aug",
    [
        ("crop", {}),
        ("flip", {"horizontal_flip": ALWAYS}),
        ("blur", {"gaussian_blur": ALWAYS}),
        ("solarize", {"solarization": ALWAYS}),
        ("equalize", {"equalization": ALWAYS, "rrc": WHOLE}),
        ("brightness", {"color_jitter": ColorJitterConfig(1.0, brightness=0.4)}),
    ],
)
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_each_channel_is_what_pillow_makes_of_it_alone(channels, name, aug):
    config = AugmentationConfig(crop_size=20, **aug)
    many, one = (Transform.random(config, (0.0,) * n, (1 / 255,) * n) for n in (channels, 1))
    image, off = bands(0, channels), []
    for u in np.random.default_rng(0).random((8, DRAWS)):
        pillows = [render(one, Image.fromarray(image[..., c]), u) for c in range(channels)]
        expected = np.stack([np.asarray(x, np.float32) for x in pillows])
        stack = torch.from_numpy(image).permute(2, 0, 1)
        for view in (many(stack, u), many.batch(stack[None], u[None])[0]):
            off.append(view.numpy() - expected)
    difference, bias = BOUNDS[name]
    assert np.abs(off).mean() <= difference + 0.1 and abs(np.mean(off)) <= bias + 0.05


def test_contrast_is_about_the_mean_of_all_channels():
    config = AugmentationConfig(rrc=WHOLE, crop_size=20, color_jitter=ColorJitterConfig(1.0, contrast=0.4))
    image = torch.from_numpy(bands(0, 4)).permute(2, 0, 1)
    u = np.full(DRAWS, 0.25)  # the factor is 1 - 0.4 + 0.25 * 0.8
    seen = image[:, 2:22].float()
    expected = (0.8 * seen + 0.2 * seen.mean()).clamp(0, 255)
    made = Transform.random(config, (0.0,) * 4, (1 / 255,) * 4)(image, u)
    torch.testing.assert_close(made, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("channels", CHANNELS)
def test_operations_on_rgb_are_left_out_and_that_is_said_once(tmp_path, given, caplog, channels):
    rest = replace(STRONG, color_jitter=ColorJitterConfig(1.0, 0.4, 0.4), grayscale=ProbConfig(0))
    data = data_of("folder", channels, tmp_path, given, format="image_folder")
    with caplog.at_level(logging.WARNING, "solo_ext"):
        [(_, seen, _)] = PretrainData(data, [STRONG, STRONG], COUNT, 0).train_dataloader()
        [(_, without, _)] = PretrainData(data, [rest, rest], COUNT, 0).train_dataloader()
    said = f"of RGB images, and left out for those of {channels} channels (data.channels)"
    assert [record.getMessage().partition("are ")[2] for record in caplog.records] == [said]
    for view, other in zip(seen, without, strict=True):
        assert torch.equal(view, other) and view.isfinite().all()


def test_of_three_channels_they_are_not(tmp_path, given, caplog):
    data = data_of("folder", 3, tmp_path, given, format="image_folder")
    [(_, [seen], _)] = PretrainData(data, [STRONG], COUNT, 0).train_dataloader()
    plain = replace(data, channels=None)
    [(_, [known], _)] = PretrainData(plain, [STRONG], COUNT, 0).train_dataloader()
    assert torch.equal(seen, known) and not caplog.records


# --- normalisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_mean_and_std_are_those_of_the_training_images(tmp_path, given, kind):
    pixels = np.stack([bands(i, 4) for i in range(COUNT)]).reshape(-1, 4) / 255
    for data in (
        PretrainData(data_of(kind, 4, tmp_path, given), [STRONG], 2, 0),
        ClassificationData(data_of(kind, 4, tmp_path, given), 2, 0),
    ):
        _, mean, std = data.eval_view
        assert mean == pytest.approx(pixels.mean(0), abs=1e-4) and std == pytest.approx(pixels.std(0), abs=1e-4)
        [transform] = data.train_dataloader().dataset.transforms
        assert transform.mean.tolist() == pytest.approx(mean)


def test_a_constant_channel_has_a_deviation(tmp_path, given):
    samples = [np.dstack([bands(i, 3), np.full((24, 20), 51, np.uint8)]) for i in range(COUNT)]
    data = PretrainData(DataConfig(num_workers=0, **given(samples)), [STRONG], COUNT, 0)
    assert data.facts.mean[3] == 0.2 and data.facts.std[3] == pytest.approx(1 / 255, abs=1e-4)
    [(_, [view], _)] = data.train_dataloader()
    assert view.isfinite().all()


def test_what_is_given_is_taken_and_nothing_is_read(tmp_path):
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    nowhere = DataConfig("custom", str(tmp_path / "none"), channels=4)
    data = PretrainData(nowhere, [AugmentationConfig(crop_size=16, mean=mean, std=std)], 2, 0)
    assert data.eval_view == (16, mean, std)
    view = ClassificationAugmentationConfig(mean=mean, std=std)
    assert ClassificationData(replace(nowhere, augmentations=view), 2, 0).eval_view == (224, mean, std)


FOUND = r": \d numbers, \[.*\], but the images have"


@pytest.mark.parametrize("value", [[0.5] * 3, [0.5], []])
def test_values_of_other_channels_are_refused(tmp_path, given, value):
    data = data_of("folder", 4, tmp_path, given)
    for name in ("mean", "std"):
        with pytest.raises(ConfigError, match=rf"^augmentations\.0\.{name}{FOUND} 4 channels"):
            PretrainData(data, [AugmentationConfig(crop_size=16, **{name: value})], 2, 0)
        view = ClassificationAugmentationConfig(**{name: value})
        with pytest.raises(ConfigError, match=rf"^data\.augmentations\.{name}{FOUND} 4 channels"):
            ClassificationData(replace(data, augmentations=view), 2, 0)
        views = [AugmentationConfig(crop_size=16), AugmentationConfig(crop_size=16, **{name: [*value, 0.5]})]
        with pytest.raises(ConfigError, match=rf"^augmentations\.1\.{name}{FOUND} 3 channels"):
            PretrainData(DataConfig("cifar10"), views, 2, 0)


def test_unreadable_images_do_not_count_where_they_are_skipped(tmp_path, given):
    data = data_of("folder", 4, tmp_path, given)
    known = PretrainData(data, [STRONG], 2, 0).facts.mean
    (tmp_path / "images/b/9.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"9\.png: not a readable image"):
        PretrainData(data, [STRONG], 2, 0)
    assert PretrainData(replace(data, corrupt="skip"), [STRONG], 2, 0).facts.mean == known
    with pytest.raises(DataError, match=r"0\.png: not a readable image \(channels: 4, not data\.channels=5\)"):
        PretrainData(replace(data, corrupt="skip", channels=5), [STRONG], 2, 0)


# --- what is read ----------------------------------------------------------------------------------------


def test_arrays_are_images_where_there_are_no_others(tmp_path, given, caplog):
    data_of("folder", 13, tmp_path, given)
    assert len(load_dataset(DataConfig("custom", str(tmp_path / "images"), channels=13), "train")) == COUNT
    (tmp_path / "images/a/x.png").write_bytes(png(bands(0, 3)))
    (tmp_path / "images/b/x.png").write_bytes(png(bands(0, 3)))
    assert len(load_dataset(DataConfig("custom", str(tmp_path / "images")), "train")) == 2
    assert f"{COUNT} .npy" in caplog.text


def test_arrays_of_three_channels_are_rgb(tmp_path):
    rgb, gray = bands(0, 3), bands(0, 1)[..., 0]
    assert torch.equal(decode(npy(rgb)), decode(png(rgb)))
    assert torch.equal(decode(npy(gray)), decode(png(gray)))


@pytest.mark.parametrize("type", ["<u2", ">u2", "f4", "f8", "f2"])
def test_values_of_more_than_8_bits(type):
    levels = bands(0, 5)
    array = (levels * 257.0 if "u" in type else levels / 255).astype(type)
    assert (decode(npy(array), channels=5) - torch.from_numpy(levels).permute(2, 0, 1)).abs().max() == 0
    how = load_how(white=4095)
    twelve = (levels * (4095 / 255)).round().astype("u2")
    assert torch.equal(decode(npy(twelve), how, 5), torch.from_numpy(levels).permute(2, 0, 1))


@pytest.mark.parametrize(
    "array, how, problem",
    [
        (
            bands(0, 5).astype("f4"),
            {},
            r"values from \d+ to \d+; give images before they are normalised, 0 to 1 \(data",
        ),
        (np.full((5, 9, 9), np.nan), {}, r"values from nan to nan; give images before"),
        (
            np.full((5, 9, 9), 4096, "u2"),
            {"white": 4095},
            r"values from 4.1e\+03 to 4.1e\+03; .*, 0 to 4095 \(data\.decode",
        ),
        (np.zeros((5, 9, 9), "i4"), {}, r"its values are torch\.int32, but an image is uint8, uint16 or floats"),
    ],
)
def test_values_that_are_no_image(array, how, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        decode(npy(array), load_how(**how), 5)


def load_how(**keys):
    return DataConfig("custom", decode=keys).decode


def test_gray_of_16_bits_is_one_channel(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (24, 20)).astype(np.uint16)
    seen = decode(png(deep), channels=1)
    assert seen.shape == (1, 24, 20) and np.abs(seen[0].numpy() - deep / 257).max() <= 0.51


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_colours_become_pillows_gray_for_one_channel(kind):
    Image.fromarray(bands(0, 3)).save(file := io.BytesIO(), kind)
    gray = torch.from_numpy(np.array(Image.open(file).convert("L")))
    assert torch.equal(decode(file.getvalue(), channels=1), gray[None])
    assert torch.equal(image_pixels(Image.open(file), channels=1), gray[None])


def test_alpha_is_a_channel_of_four_turned_as_the_camera_has_noted():
    array = bands(0, 4)
    Image.fromarray(array).save(
        file := io.BytesIO(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0"
    )
    turned = torch.from_numpy(array[::-1, ::-1].copy()).permute(2, 0, 1)
    assert torch.equal(decode(file.getvalue(), load_how(orientation="exif"), 4), turned)


@pytest.mark.skipif(not find_spec("tifffile"), reason="needs the extra tiff")
@pytest.mark.parametrize("layout", ["pixels", "planes", "pages", "rgb and infrared"])
def test_bands_of_a_tiff(layout):
    import tifffile

    levels = bands(0, 4 if "rgb" in layout else 13)
    planes, kwargs = levels.transpose(2, 0, 1), {"photometric": "minisblack"}
    if layout == "pixels":
        array, kwargs["planarconfig"] = levels, "contig"
    elif layout == "planes":
        array, kwargs["planarconfig"] = planes, "separate"
    elif layout == "pages":
        array = planes
    else:
        array, kwargs = levels, {"photometric": "rgb", "extrasamples": ["unspecified"], "byteorder": ">"}
    tifffile.imwrite(file := io.BytesIO(), array.astype(np.uint16) * 257, **kwargs)
    assert torch.equal(decode(file.getvalue(), channels=levels.shape[2]), torch.from_numpy(planes.copy()))


def test_a_tiff_of_bands_names_what_it_needs(tmp_path, monkeypatch):
    Image.fromarray(bands(0, 4)).save(tmp_path / "x.tif")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DataError, match=r"x\.tif: not a readable image \(.* needs tifffile, .* 'solo-ext\[tiff\]'\)$"):
        load_dataset(DataConfig("custom", str(tmp_path), channels=4), "train").images[0]
    assert load_dataset(DataConfig("custom", str(tmp_path)), "train").images[0].shape == (3, 24, 20)


@pytest.mark.parametrize(
    "shape, channels",
    [((24, 20), 3), ((1, 24, 20), 3), ((24, 20, 1), 3), ((3, 24, 20), 3), ((24, 20, 3), 3)]
    + [((c, 24, 20), c) for c in (2, 4, 13)]
    + [((24, 20, c), c) for c in (2, 4, 13)],
)
def test_a_dataset_says_its_channels(given, shape, channels):
    keys = given([np.zeros(shape, np.uint8)])
    assert keys.get("channels") == (None if channels == 3 else channels)
    assert load_dataset(DataConfig(**keys), "train").images[0].shape == (channels, 24, 20)


def test_which_end_are_the_channels_can_be_said():
    patch = torch.arange(200 * 9 * 9).remainder(256).to(torch.uint8).view(200, 9, 9)
    assert torch.equal(array_pixels(patch, channels=200), patch)
    assert torch.equal(array_pixels(patch.permute(1, 2, 0), channels=200), patch)


# --- what is refused -------------------------------------------------------------------------------------


def test_images_of_other_channels_are_named(tmp_path, given):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(png(bands(0, 4)))
    (tmp_path / "images/1.png").write_bytes(png(bands(0, 3)))
    images = load_dataset(DataConfig("custom", str(tmp_path / "images"), channels=4), "train").images
    assert images[0].shape == (4, 24, 20)
    with pytest.raises(DataError, match=r"images/1\.png: not a readable image \(channels: 3, not data\.channels=4\)$"):
        images[1]
    with pytest.raises(DataError, match=r"images/0\.png: .*channels: 4, not data\.channels=2"):  # and no other is read
        load_dataset(DataConfig("custom", str(tmp_path / "images"), channels=2), "train")
    mixed = given([bands(0, 4), bands(0, 5), bands(0, 1)[..., 0]])
    images = load_dataset(DataConfig(**mixed), "train").images
    for i, shape in ((1, r"\[24, 20, 5\]"), (2, r"\[24, 20\]")):
        match = rf"^Rows\[{i}\]: not a readable image \(its shape is {shape}, no image of data\.channels=4\)$"
        with pytest.raises(DataError, match=match):
            images[i]


@pytest.mark.parametrize("channels, number", [(0, "a whole number of at least 1, not 0"), (2.5, "whole number")])
def test_a_number_of_channels(channels, number):
    with pytest.raises(ConfigError, match=rf"^data\.channels must be .*{number}"):
        DataConfig("custom", channels=channels)


def test_images_in_memory_have_the_channels_that_they_have():
    with pytest.raises(ConfigError, match=r"^data\.channels: 4, but the images of 'fashion_mnist_mini' have 1$"):
        load_dataset(DataConfig("fashion_mnist_mini", channels=4), "train")
    [(_, [view], _), *_] = PretrainData(
        DataConfig("fashion_mnist_mini", channels=1, fraction=0.01), [AugmentationConfig(crop_size=12)], 16, 0
    ).train_dataloader()
    assert view.shape == (16, 1, 12, 12)


def test_dali_reads_rgb_and_auto_knows_it(monkeypatch):
    monkeypatch.setattr("solo_ext.data.modules._without_dali", lambda: "")
    images = FileImages("images", np.array([b"a.png"]), channels=4)
    assert pick_format(DataConfig("custom"), images, torch.device("cuda")) == "image_folder"
    with pytest.raises(ConfigError, match=r"^data\.format: 'dali' reads RGB, not data\.channels=4; use image_folder$"):
        pick_format(DataConfig("custom", format="dali"), images, CPU)
