"""From an encoded image to 8-bit RGB, as `data.decode` says."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from solo_ext.errors import reason
from solo_ext.files import log
from solo_ext.schema import Config, Positive

ORIENTATION, PHOTOMETRIC = 0x112, 262  # tags of EXIF and of TIFF


@dataclass
class DecodeConfig(Config, section="data.decode"):
    """`data.decode`: what becomes of that which 8-bit RGB cannot hold; by default as in torchvision and solo-learn, but
    for gray values of more than 8 bits, which Pillow clips at 255."""

    orientation: Literal["stored", "exif"] = "stored"  # exif: turned as the camera has noted
    alpha: Literal["drop", "black", "white"] = "drop"  # drop: the colours below it; else laid on that background
    # the gray value that is white; null: 65535 for 16 bits, 1 for floats. Larger and negative ones are errors
    white: Positive | None = None


AS_STORED = DecodeConfig()


def decode(data: bytes, how: DecodeConfig = AS_STORED) -> Tensor:
    """The image in `data`, an encoded file: uint8 [3, H, W], RGB. Raises whatever the decoders raise."""
    with Image.open(io.BytesIO(data)) as image:  # reads the header, and refuses decompression bombs
        if is_plain_jpeg(image, how) and (fast := jpeg_decoder()):
            return fast(data)
        return pixels(to_rgb(image, how))


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
