"""Read one image file as a tensor, whichever program wrote it, and name the files that cannot be read."""

import functools
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale  # pyright: ignore[reportMissingTypeStubs]

from ecanet.errors import DataError

__all__ = ["HOW_TO_SKIP", "IMAGE_SUFFIXES", "Unreadable", "decode_image", "read_image", "to_tensor"]

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".heic", ".heif", ".avif"
)  # fmt: skip

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what it may read here; cameras write MPO into files called .jpg.

It would read 40 more, whatever the file is called: PostScript by running Ghostscript.
"""

HOW_TO_SKIP = "to skip such files, set data.on_corrupt=skip (train: --set; eval, predict, detect: --on-corrupt skip)"
"""The remedy in the error message for a file or annotation that cannot be used."""

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
"""The file types in bytes 8 to 12 of an ISO media file (ISO/IEC 14496-12, 4.3; the HEIF and AV1 image formats)."""

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by the value of its EXIF orientation tag."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A data set's item in place of an image that could not be read.

    A worker process returns it instead of raising an exception, because PyTorch adds the worker's traceback to the
    message of an exception. The main process raises or skips.
    """

    message: str


def read_image(path: str | Path, channels: int, *, upright: bool = True) -> Tensor:
    """Return the image file at ``path`` as a uint8 tensor (``channels``, H, W): 1 channel is grey, 3 are RGB.

    The image is turned upright by its EXIF orientation. With ``upright=False`` it stays as it is stored, except a TIFF
    file, which Pillow turns in any case, and a HEIC file, which its decoder turns.

    Raises:
        DataError: the file does not exist, is not an image, is truncated, holds floating-point values, or needs a
            package that is not installed.
    """
    if not Path(path).is_file() and Path(path).exists():  # to open a pipe would wait for someone who writes to it
        raise DataError(f"{path}: it is no file, but a folder, a pipe, a socket or a device")
    return _read(path, str(path), channels, upright)


def decode_image(content: bytes, name: str, channels: int) -> Tensor:
    """Return the image file with this ``content`` as `read_image` does; error messages call it ``name``.

    Raises:
        DataError: as for `read_image`.
    """
    return _read(BytesIO(content), name, channels, upright=True)


def _read(file: str | Path | BytesIO, name: str, channels: int, upright: bool) -> Tensor:
    try:
        with open_image(file) as stored:
            image = convert_to_8_bits(turn_upright(stored) if upright else stored)
            return pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: cannot be read as an image (not an image)") from None
    except Exception as error:  # Pillow's decoders raise exceptions of almost any type for a broken file
        raise DataError(f"{name}: cannot be read as an image ({str(error) or type(error).__name__})") from None


def to_tensor(image: "Image.Image | NDArray[np.generic] | Tensor", channels: int) -> Tensor:
    """Return an image as a uint8 tensor (``channels``, H, W): 1 channel is grey, 3 are RGB.

    It is a Pillow image, an array (H, W), (H, W, 1) or (H, W, 3) of bytes, or a tensor (C, H, W) of bytes or of values
    from 0 to 1.

    Raises:
        DataError: it is nothing of these.
    """
    if isinstance(image, Image.Image):
        return pil_to_tensor(convert_to_8_bits(turn_upright(image)).convert("L" if channels == 1 else "RGB"))
    if isinstance(image, Tensor) and image.is_floating_point():
        if not 0 <= float(image.min()) <= float(image.max()) <= 1:
            raise DataError("a tensor of floating-point numbers must be from 0 to 1, before any normalization")
        image = (image * 255).round().to(torch.uint8)
    pixels = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    if not isinstance(image, Tensor):
        pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        shape = f"{tuple(image.shape)} of {image.dtype}"
        raise DataError(f"an image is an array (H, W, 3) of uint8 or a tensor (3, H, W), got {shape}")
    if channels == 1 and pixels.shape[0] == 3:
        return rgb_to_grayscale(pixels)
    return pixels.expand(channels, -1, -1)


def open_image(file: str | Path | BytesIO) -> Image.Image:
    """Return the image in ``file``, a path or the content, opened by Pillow; pillow-heif adds HEIC if installed.

    Raises:
        DataError: it is HEIC or AVIF, and nothing is installed that reads it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            return Image.open(file, formats=[name for name in FORMATS if name in _list_formats()])
    except UnidentifiedImageError:
        # The content decides: telephones and converters also write HEIC into files called .jpg.
        head = _read_head(file)
        if head[4:8] != b"ftyp" or head[8:12] not in (*HEIC_BRANDS, *AVIF_BRANDS):
            raise
    if head[8:12] in AVIF_BRANDS:
        raise DataError("AVIF needs Pillow 11.3 or newer; pip install --upgrade 'pillow>=11.3'")
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError("HEIC needs pillow-heif; pip install 'ecanet[heic]'") from None
    pillow_heif.register_heif_opener()  # pyright: ignore[reportUnknownMemberType]
    return Image.open(file, formats=["HEIF"])


def _read_head(file: str | Path | BytesIO) -> bytes:
    """Return the first bytes of ``file``, which say its type."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:12]
    with Path(file).open("rb") as opened:
        return opened.read(12)


@functools.cache
def _list_formats() -> frozenset[str]:
    """Return the names of the formats that this Pillow can read; older ones have no AVIF."""
    Image.init()
    return frozenset(Image.OPEN)


def turn_upright(image: Image.Image) -> Image.Image:
    """Return ``image`` turned by its EXIF orientation, or unchanged if the EXIF data are broken."""
    try:
        transposition = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # Pillow raises exceptions of almost any type for broken EXIF data; the pixels may be intact
        return image
    return image if transposition is None else image.transpose(transposition)


def convert_to_8_bits(image: Image.Image) -> Image.Image:
    """Return ``image`` with 8 bits per value; 16-bit values are divided by 257.

    Pillow's own conversion would clip every value above 255 to white.

    Raises:
        DataError: the values have no known range, so they cannot be scaled.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("its values do not fit 16 bits; convert it to 8 or 16 bits per value first")
        return Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise DataError("its values are floating-point and have no known range; convert it to 8 or 16 bits first")
    return image
