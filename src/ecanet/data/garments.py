"""Garments: Fashion-MNIST's clothing in colour on real photographs, as images of 32 × 32 pixels.

The held-out images show held-out clothing on photographs that no training image shows.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ecanet.data.cache import digest_arrays, keep_arrays, show_progress
from ecanet.data.photographs import PHOTOGRAPHS, Pixels, crop_square, load_photographs

__all__ = ["SIZE", "dress_photographs", "make_loader"]

Load = Callable[[str | None, bool], tuple[Tensor, Tensor]]
"""``load(root, train)`` returns images (N, C, H, W) and labels (N,)."""

SIZE = 32
"""Height and width of the images in pixels."""

EDITION = 1
"""Increase this when the generator changes, so that kept sets are made again."""


def make_loader(load_clothing: Load) -> Load:
    """Return the function that loads ``garments``; ``load_clothing`` loads Fashion-MNIST from the same root.

    It makes the images if the cache does not have them, and raises DataError if a photograph or a file of Fashion-MNIST
    is missing.
    """

    def load(root: str | None, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = load_clothing(root, train)
        clothing = np.asarray(images[:, 0]), np.asarray(labels)
        part = "train" if train else "held out"
        ingredients = {
            "edition": EDITION,
            "part": part,
            "clothing": digest_arrays(clothing),
            "photographs": PHOTOGRAPHS,
        }
        name = f"garments-{part.replace(' ', '-')}"
        return keep_arrays(name, ingredients, lambda: (dress_photographs(clothing[0], train=train), clothing[1]))

    return load


def dress_photographs(clothing: Pixels, *, train: bool, seed: int = 0) -> Pixels:
    """Return grey ``clothing`` (N, 28, 28), each in a random colour on a crop of a photograph: (N, 32, 32, 3).

    Clothing stands at a random position. It covers the photograph where it is at least a quarter bright, and lets it
    shine through where it is darker; black is its background.

    Raises:
        DataError: a photograph is missing.
    """
    photographs = load_photographs("train" if train else "held out")
    images = np.empty((len(clothing), SIZE, SIZE, 3), dtype=np.uint8)
    for n in show_progress(range(len(clothing)), f"garments: {len(clothing):,} images"):
        # Each image has its own generator: image 100 is the same however many images there are.
        random = np.random.default_rng((seed, int(train), n))
        images[n] = _dress(clothing[n], crop_square(photographs, SIZE, random), random)
    return images


def _dress(garment: Pixels, background: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    grey = np.zeros((SIZE, SIZE, 1))
    height, width = garment.shape
    rows: int = SIZE - height + 1
    columns: int = SIZE - width + 1
    top, left = int(random.integers(rows)), int(random.integers(columns))
    grey[top : top + height, left : left + width, 0] = garment
    opacity = np.minimum(grey / 64, 1)
    return (opacity * grey * random.uniform(0.3, 1, 3) + (1 - opacity) * background).round()
