"""What is decoded is what is in the file: every kind of image in every format, against values known before it was
written."""

import io
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from solo_ext.data.augmentations import AugmentationConfig, RandomResizedCropConfig
from solo_ext.data.datasets import DataConfig, load_dataset
from solo_ext.data.loader import EpochSampler, ViewDataset
from solo_ext.data.modules import make_loader
from solo_ext.data.transforms import Transform
from solo_ext.errors import ConfigError, DataError

SIDE = 24
FORMATS = ["image_folder", "tensor", *["h5"] * bool(find_spec("h5py"))]
if find_spec("nvidia") and find_spec("nvidia.dali"):
    FORMATS.append("dali")
RNG = np.random.default_rng(0)
GRAY, RGB = RNG.integers(0, 256, (SIDE, SIDE)), RNG.integers(0, 256, (SIDE, SIDE, 3))
ALPHA, INK = RNG.integers(0, 256, (SIDE, SIDE)), RNG.integers(0, 256, (SIDE, SIDE, 4))
DEEP, FLOAT = RNG.integers(0, 65536, (SIDE, SIDE)), RNG.random((SIDE, SIDE))
DEEP_RGB = np.dstack([DEEP, 65535 - DEEP, DEEP])
BYTES = RGB.astype(np.uint8)
MASK = GRAY > 127


def pillow(array: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    image = Image.frombytes(mode, (SIDE, SIDE), array.tobytes()) if mode else Image.fromarray(array)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def png16(values: np.ndarray) -> bytes:
    """16 bits for each of 3 channels, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.3, table 6: where row 0 and column 0 of what is stored belong."""
    turned = array.swapaxes(0, 1) if orientation > 4 else array
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return turned[:: -1 if down else 1, :: -1 if right else 1]


PRINTED = (255 - INK[..., :3]) * (255 - INK[..., 3:]) / 255
RGBA = np.dstack([BYTES, ALPHA.astype(np.uint8)])
PALETTE = Image.fromarray(BYTES).quantize(64)
PALETTE.save(PALETTE_FILE := io.BytesIO(), "PNG", transparency=0)
COLOURS = np.array(PALETTE.getpalette()[: 3 * 64]).reshape(-1, 3)[np.array(PALETTE)]
JPEG = np.kron(RNG.integers(40, 216, (3, 3)), np.ones((8, 8))).astype(np.uint8)  # a shade for each block
GRADIENT = np.tile(np.linspace(20, 230, SIDE), (SIDE, 1)).astype(np.uint8)
INVERTED = {262: 0}  # a TIFF's PhotometricInterpretation: 0 is white

# kind -> the file, what is in it in levels, `data.decode`, and how far off it may be
KINDS = {
    "gray.png": (pillow(GRAY.astype(np.uint8), "PNG"), GRAY, {}, 0),
    "gray.bmp": (pillow(GRAY.astype(np.uint8), "BMP"), GRAY, {}, 0),
    "gray.pgm": (pillow(GRAY.astype(np.uint8), "PPM"), GRAY, {}, 0),
    "bilevel.png": (pillow(MASK, "PNG"), 255 * MASK, {}, 0),
    "bilevel.tif": (pillow(MASK, "TIFF"), 255 * MASK, {}, 0),
    "12bit.pgm": (b"P5 24 24 4095\n" + (DEEP // 16).astype(">u2").tobytes(), DEEP // 16 / 4095 * 255, {}, 0.51),
    "16bit.png": (pillow(DEEP.astype(np.uint16), "PNG"), DEEP / 257, {}, 0.51),
    "16bit.tif": (pillow(DEEP.astype(np.uint16), "TIFF"), DEEP / 257, {}, 0.51),
    "16bit-big.tif": (pillow(DEEP.astype(">u2"), "TIFF", "I;16B"), DEEP / 257, {}, 0.51),
    "16bit-inverted.tif": (pillow(DEEP.astype(np.uint16), "TIFF", tiffinfo=INVERTED), 255 - DEEP / 257, {}, 0.51),
    "16bit.pgm": (b"P5 24 24 65535\n" + DEEP.astype(">u2").tobytes(), DEEP / 257, {}, 0.51),
    "12-of-16bit.png": (pillow((DEEP // 16).astype(np.uint16), "PNG"), DEEP / 257, {"white": 4095}, 0.6),
    "16bit-colour.png": (png16(DEEP_RGB), DEEP_RGB / 257, {}, 1),
    "32bit.tif": (pillow(DEEP.astype(np.int32) * 9, "TIFF"), DEEP / 257, {"white": 9 * 65535}, 0.51),
    "float.tif": (pillow(FLOAT.astype(np.float32), "TIFF"), 255 * FLOAT, {}, 0.51),
    "float-of-255.tif": (pillow((255 * FLOAT).astype(np.float32), "TIFF"), 255 * FLOAT, {"white": 255}, 0.51),
    "rgb.png": (pillow(BYTES, "PNG"), RGB, {}, 0),
    "rgb.webp": (pillow(BYTES, "WEBP", lossless=True), RGB, {}, 0),
    "rgb.tif": (pillow(BYTES, "TIFF", compression="tiff_lzw"), RGB, {}, 0),
    "rgb.ppm": (pillow(BYTES, "PPM"), RGB, {}, 0),
    "cmyk.tif": (pillow(INK.astype(np.uint8), "TIFF", "CMYK"), PRINTED, {}, 2),
    "gray.jpg": (pillow(JPEG, "JPEG", quality=100), JPEG, {}, 2),
    "rgb.jpg": (pillow(np.dstack([JPEG] * 3), "JPEG", quality=100), JPEG, {}, 2),
    "progressive.jpg": (pillow(np.dstack([JPEG] * 3), "JPEG", quality=100, progressive=True), JPEG, {}, 2),
    "cmyk.jpg": (pillow(np.dstack([255 - JPEG] * 3 + [0 * JPEG]), "JPEG", "CMYK", quality=100), JPEG, {}, 2),
    "palette.png": (PALETTE_FILE.getvalue(), COLOURS, {}, 0),
    "palette-on-white.png": (
        PALETTE_FILE.getvalue(), np.where(np.array(PALETTE)[..., None] == 0, 255, COLOURS), {"alpha": "white"}, 0,
    ),
    "alpha.png": (pillow(RGBA, "PNG"), RGB, {}, 0),
    "alpha-on-black.png": (pillow(RGBA, "PNG"), RGB * ALPHA[..., None] / 255, {"alpha": "black"}, 1),
    "alpha-on-white.png": (
        pillow(RGBA, "PNG"), RGB * (ALPHA[..., None] / 255) + 255 - ALPHA[..., None], {"alpha": "white"}, 1,
    ),
    "alpha-on-white.webp": (
        pillow(RGBA, "WEBP", lossless=True, exact=True), RGB * (ALPHA[..., None] / 255) + 255 - ALPHA[..., None],
        {"alpha": "white"}, 1,
    ),
    "gray-alpha.png": (
        pillow(np.dstack([GRAY, ALPHA]).astype(np.uint8), "PNG", "LA"), GRAY * (ALPHA / 255), {"alpha": "black"}, 1,
    ),
    "turned.png": (pillow(BYTES, "PNG", exif=exif(6)), RGB, {}, 0),
    **{
        f"turned-{i}.png": (pillow(BYTES, "PNG", exif=exif(i)), upright(RGB, i), {"orientation": "exif"}, 0)
        for i in range(1, 9)
    },
    **{
        f"turned-{i}.jpg": (
            pillow(GRADIENT, "JPEG", quality=100, exif=exif(i)), upright(GRADIENT, i), {"orientation": "exif"}, 3
        )
        for i in (1, 3, 6)
    },
    "rgb.npy": (npy(BYTES), RGB, {}, 0),
    "planes.npy": (npy(BYTES.transpose(2, 0, 1)), RGB, {}, 0),
    "16bit.npy": (npy(DEEP.astype(np.uint16)), DEEP / 257, {}, 0.51),
    "12-of-16bit.npy": (npy((DEEP // 16).astype(np.uint16)), DEEP / 257, {"white": 4095}, 0.6),
    "float.npy": (npy(FLOAT), 255 * FLOAT, {}, 0.51),
    "turned-16bit.png": (
        pillow(DEEP.astype(np.uint16), "PNG", exif=exif(6)), upright(DEEP / 257, 6), {"orientation": "exif"}, 0.51,
    ),
}  # fmt: skip


def views(folder, format: str, **how) -> torch.Tensor:
    """The images of `folder` in levels, as a run in `format` shows them to the network."""
    path = folder
    if format == "h5":
        from solo_ext.data.h5 import write_h5

        path = folder.with_suffix(".h5")
        write_h5(folder, path)
    data = DataConfig("custom", str(path), format=format, num_workers=0, decode=how or None)
    whole = AugmentationConfig(rrc=RandomResizedCropConfig(enabled=False), crop_size=SIDE)
    dataset = ViewDataset(load_dataset(data, "train"), [Transform.random(whole, (0.0,) * 3, (1 / 255,) * 3)], 0)
    loader = make_loader(data, dataset, torch.device("cpu"), sampler=EpochSampler(1, 0), batch_size=1)
    [(_, [view], _)] = loader
    return view[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_decoded_is_what_is_there(tmp_path, kind, format):
    file, levels, how, bound = KINDS[kind]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / kind).write_bytes(file)
    seen = views(tmp_path / "images", format, **how)
    expected = np.broadcast_to(levels if np.ndim(levels) == 3 else levels[..., None], (SIDE, SIDE, 3))
    assert np.abs(seen.permute(1, 2, 0).numpy() - expected).max() <= bound + 1e-3


@pytest.mark.parametrize(
    "name, array, white, problem",
    [
        (
            "32bit.tif",
            DEEP.astype(np.int32),
            None,
            r"32-bit gray, values from \d+ to \d+; data\.decode\.white",
        ),
        ("float.tif", (255 * FLOAT).astype(np.float32), None, r"gray values from \S+ to 25\S+, outside 0 to 1; data"),
        ("float.tif", (FLOAT - 0.5).astype(np.float32), None, r"gray values from -0\.\d+ to \S+, outside 0 to 1; data"),
        ("float.tif", np.full((SIDE, SIDE), np.nan, np.float32), None, r"gray values from nan to nan, outside 0 to 1"),
        ("16bit.png", DEEP.astype(np.uint16), 4095, r"gray values from \d+ to \d+, outside 0 to 4095; data"),
    ],
)
def test_gray_beyond_its_range_is_an_error_and_not_clipped(tmp_path, name, array, white, problem):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: not a readable image \({problem}"):
        views(tmp_path, "image_folder", **({"white": white} if white else {}))


def test_a_picture_of_pillow_s_is_shown_as_its_file_is(tmp_path):
    image = Image.fromarray(DEEP.astype(np.uint16))
    image.save(tmp_path / "0.png")
    transform = Transform(SIDE, SIDE, (0.0,) * 3, (1 / 255,) * 3)
    assert torch.equal(transform(image), views(tmp_path, "image_folder"))


def test_images_in_memory_are_not_decoded():
    with pytest.raises(ConfigError, match=r"^data\.decode: the images of 'fashion_mnist_mini' are not decoded"):
        load_dataset(DataConfig("fashion_mnist_mini", decode={"alpha": "white"}), "train")
