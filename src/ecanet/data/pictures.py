"""Picture files as tensors, whatever wrote them; what cannot be read is said in one line."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ecanet.errors import DataError

__all__ = ["HOW_TO_SKIP", "read_image"]

HOW_TO_SKIP = "data.on_corrupt=skip goes on without such (train: --set; eval, predict, detect: --on-corrupt skip)"
"""What an error says about what cannot be read."""


def read_image(path: str | Path, channels: int, *, upright: bool = True) -> Tensor:
    """The image file at ``path`` as uint8 (channels, H, W): 1 is grey, 3 is RGB; turned as its camera says.

    With ``upright`` false it is as it is stored (but for TIFF, which Pillow turns in any case).

    Raises:
        DataError: there is no such file, or it is no image, or only part of one.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as stored:
            return pil_to_tensor(
                shallow(turned(stored) if upright else stored).convert("L" if channels == 1 else "RGB")
            )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # a broken image makes Pillow raise almost anything
        why = "not an image" if type(error).__name__ == "UnidentifiedImageError" else str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({why})") from None


def turned(image: Any) -> Any:
    """Pillow's ``image``, turned as its EXIF says; where that is broken, as it is."""
    from PIL import Image

    flips = Image.Transpose
    ways = {
        2: flips.FLIP_LEFT_RIGHT, 3: flips.ROTATE_180, 4: flips.FLIP_TOP_BOTTOM, 5: flips.TRANSPOSE,
        6: flips.ROTATE_270, 7: flips.TRANSVERSE, 8: flips.ROTATE_90,
    }  # fmt: skip
    try:
        way = ways.get(image.getexif().get(0x0112))
    except Exception:  # Pillow raises almost anything here, and the pixels may be sound
        return image
    return image if way is None else image.transpose(way)


def shallow(image: Any) -> Any:
    """Pillow's ``image`` with 8 bits a value: 16 are scaled down (Pillow itself would turn all above 255 white).

    Raises:
        DataError: values without a known range, which nobody can scale.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("its values do not fit 16 bits; convert it to 8 or 16 bits a value first")
        from PIL import Image

        return Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise DataError("its values are floating-point, of no known range; convert it to 8 or 16 bits a value first")
    return image
