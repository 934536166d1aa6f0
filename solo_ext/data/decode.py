"""From an encoded image, or an array, to 8-bit RGB or other channels, as `data.decode` says."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from solo_ext.errors import reason, require
from solo_ext.files import log
from solo_ext.schema import Config, Positive

ORIENTATION, PHOTOMETRIC = 0x112, 262  # tags of EXIF and of TIFF
ARRAY, TIFF = b"\x93NUMPY", (b"II", b"MM")  # what files of NumPy and TIFF begin with


@dataclass
class DecodeConfig(Config, section="data.decode"):
    """`data.decode`: what becomes of that which 8-bit RGB cannot hold; by default as in torchvision and solo-learn, but
    for gray values of more than 8 bits, which Pillow clips at 255."""

    orientation: Literal["stored", "exif"] = "stored"  # exif: turned as the camera has noted
    alpha: Literal["drop", "black", "white"] = "drop"  # drop: the colours below it; else laid on that background
    # the gray value that is white; null: 65535 for 16 bits, 1 for floats. Larger and negative ones are errors
    white: Positive | None = None


AS_STORED = DecodeConfig()


def decode(data: bytes, how: DecodeConfig = AS_STORED, channels: int = 3) -> Tensor:
    """The image in `data`, an encoded file or an .npy: uint8 [channels, H, W]. Raises whatever the decoders raise."""
    array: np.ndarray | None = None
    if data.startswith(ARRAY):
        array = np.load(io.BytesIO(data), allow_pickle=False)
    elif channels not in (1, 3) and data.startswith(TIFF):  # Pillow leaves out bands that it does not know
        require("tifffile", "TIFF of other channels", "tiff")
        import tifffile

        array = tifffile.imread(io.BytesIO(data))
    if array is not None:
        return array_pixels(torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), how, channels)
    with Image.open(io.BytesIO(data)) as image:  # reads the header, and refuses decompression bombs
        if channels == 3 and is_plain_jpeg(image, how) and (fast := jpeg_decoder()):
            return fast(data)
        return image_pixels(image, how, channels)


def size_of(data: bytes, how: DecodeConfig = AS_STORED, channels: int = 3) -> tuple[int, int]:
    """Height and width of what `decode` makes of `data`: by the header, where that says it."""
    if data.startswith((ARRAY, *TIFF)):
        return tuple(decode(data, how, channels).shape[-2:])  # type: ignore[return-value]
    with Image.open(io.BytesIO(data)) as image:
        turned = how.orientation == "exif" and image.getexif().get(ORIENTATION, 1) >= 5
        return image.size if turned else image.size[::-1]


def image_pixels(image: Image.Image, how: DecodeConfig = AS_STORED, channels: int = 3) -> Tensor:
    """uint8 [channels, H, W]: RGB, or of 1 gray, else all bands of the image, alpha too. Raises ValueError if they are
    others, or as `to_rgb` does."""
    if channels == 3:
        return pixels(to_rgb(image, how))
    if channels == 1:
        return pixels(to_rgb(image, how).convert("L"))
    if (bands := len(image.getbands())) != channels:
        raise ValueError(f"channels: {bands}, not data.channels={channels}")
    return pixels(ImageOps.exif_transpose(image) if how.orientation == "exif" else image)


def array_pixels(image: Tensor, how: DecodeConfig = AS_STORED, channels: int = 3) -> Tensor:
    """uint8 [channels, H, W] of [H, W], [C, H, W] or [H, W, C]: bytes, or uint16 or floats by their white, as of gray.

    channels: C, or 3 where one is repeated; 0: 3 of 1 or 3, else the smaller of the shape's ends. Raises ValueError for
    other shapes and types, and for values that are not between black and white.
    """
    shape, fitting = list(image.shape), (1, 3) if channels in (0, 3) else (channels,)
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and shape[0] not in fitting:
        last = shape[2] in fitting or (not channels and shape[2] < shape[0])
        image = image.permute(2, 0, 1) if last else image
    if image.ndim != 3 or (channels and image.shape[0] not in fitting):
        raise ValueError(f"its shape is {shape}, no image{f' of data.channels={channels}' if channels else ''}")
    if image.dtype != torch.uint8:
        white = how.white or (1.0 if image.is_floating_point() else 65535.0 if image.dtype == torch.uint16 else None)
        if white is None:
            raise ValueError(f"its values are {image.dtype}, but an image is uint8, uint16 or floats from 0 to 1")
        image = image if image.is_floating_point() else image.double()
        low, high = image.min().item(), image.max().item()
        if not 0 <= low <= high <= white:  # NaN neither
            allowed = f"0 to {white:g} (data.decode.white)"
            raise ValueError(f"values from {low:.3g} to {high:.3g}; give images before they are normalised, {allowed}")
        image = (image * (255 / white)).round().to(torch.uint8)
    return image.expand(3 if 3 in fitting and len(image) == 1 else -1, -1, -1).contiguous()


def to_rgb(image: Image.Image, how: DecodeConfig = AS_STORED) -> Image.Image:
    """Raises ValueError for gray values that are not between black and white."""
    white, inverted = _white(image, how), getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    if how.orientation == "exif":
        image = ImageOps.exif_transpose(image)
    if white:
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):  # NaN neither
            found = f"gray values from {low:g} to {high:g}, outside 0 to {white:g}"
            raise ValueError(f"{found}; data.decode.white says which is white")
        values = np.rint((white - values if inverted else values) * (255 / white))
        image = Image.fromarray(values.astype(np.uint8))
    if how.alpha != "drop" and ("A" in image.getbands() or "transparency" in image.info):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, how.alpha), layer)
    return image.convert("RGB")


def _white(image: Image.Image, how: DecodeConfig) -> float | None:
    """The value that is white in a gray image of more than 8 bits; None for another one."""
    if image.mode[0] not in "IF":
        return None
    # of PNG and PGM, some versions of Pillow have 16 bits in 32
    sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if white := how.white or (1.0 if image.mode == "F" else 65535.0 if sixteen else None):
        return white
    low, high = image.getextrema()
    raise ValueError(f"32-bit gray, values from {low} to {high}; data.decode.white has to say which is white")


@cache
def jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """torchvision's, which is faster than Pillow's and takes a second to import; None, and a warning, without one."""

    def fast(data: bytes) -> Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        Image.new("RGB", (8, 8)).save(sample := io.BytesIO(), "JPEG")
        fast(sample.getvalue())
        return fast
    except Exception as error:  # it is missing, or a library behind it
        log.warning("torchvision does not decode JPEG here (%s); Pillow does, more slowly", reason(error))
        return None


def is_plain_jpeg(image: Image.Image, how: DecodeConfig = AS_STORED) -> bool:
    """Whether libjpeg itself turns it into RGB; CMYK needs Pillow, and so does one that has to be turned."""
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    return plain and (how.orientation == "stored" or image.getexif().get(ORIENTATION, 1) == 1)


def pixels(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an RGB or gray image."""
    return channels_first(torch.from_numpy(np.array(image)[None]))[0]


def channels_first(batch: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, C] to [N, C, H, W]."""
    return batch[:, None] if batch.dim() == 3 else batch.permute(0, 3, 1, 2)
