"""Real photographs that scikit-image and scikit-learn carry in their wheels, as backgrounds for generated data sets."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecanet.errors import DataError

__all__ = ["PHOTOGRAPHS", "crop_square", "find_package", "load_photographs"]

Pixels = NDArray[np.uint8]

PHOTOGRAPHS: dict[str, dict[str, str]] = {
    "train": {
        "skimage/data/astronaut.png": "88431cd9653c",
        "skimage/data/brick.png": "7966caf324f6",
        "skimage/data/camera.png": "b0793d2adda0",
        "skimage/data/chelsea.png": "596aa1e7cb87",
        "skimage/data/grass.png": "b6b6022426b3",
        "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a92",
        "skimage/data/ihc.png": "f8dd1aa387dd",
        "skimage/data/retina.jpg": "38a07f36f27f",
        "skimage/data/rocket.jpg": "c2dd0de7c538",
        "sklearn/datasets/images/flower.jpg": "a77f6ec41e35",
    },
    "held out": {
        "skimage/data/coffee.png": "cc02f8ca188b",
        "skimage/data/gravel.png": "c48615b451bf",
        "sklearn/datasets/images/china.jpg": "8378025ad251",
    },
}
"""The first digits of each file's SHA-256, by its path below the packages' folder, for each part of a data set.

Left out are photographs with writing on them (page, text, coins), and those whose licence is not stated.
"""

LONG_SIDE = 640
"""Larger photographs are reduced to about this many pixels, so that a crop shows more than a patch of one colour."""


def find_package(name: str) -> Path | None:
    """Return the folder of the installed package ``name``, without importing it, or None if it is not installed."""
    spec = find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def load_photographs(part: str) -> list[Pixels]:
    """Return the photographs (H, W, 3) of ``part``, "train" or "held out"; no photograph is in both.

    Raises:
        DataError: a photograph is missing, or is not the one that the data sets are made from.
    """
    return [_load(path, digest) for path, digest in PHOTOGRAPHS[part].items()]


def _load(path: str, digest: str) -> Pixels:
    package, _, inside = path.partition("/")
    folder = find_package(package)
    file = folder / inside if folder else Path(path)
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest()[:12] != digest:
        problem = "is not the file of scikit-image 0.26 and scikit-learn 1.9" if file.is_file() else "is missing"
        raise DataError(f"{file}: the photograph {problem}; install both with: pip install 'ecanet[glyphs]'")
    with Image.open(file) as image:
        colour = image.convert("RGB")
        return np.asarray(colour.reduce(max(1, round(max(colour.size) / LONG_SIDE))))


def crop_square(photographs: Sequence[Pixels], size: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Return a random square of one of ``photographs`` as (size, size, 3), values from 0 to 255.

    The square has 1 to 6 times ``size`` pixels on a side and is scaled by averaging. It is mirrored half the time, and
    each of its channels is darkened at random, which also tints the grey photographs.
    """
    photograph = photographs[int(random.integers(len(photographs)))]
    height, width = photograph.shape[:2]
    largest: int = min(6, height // size, width // size)
    step = int(random.integers(1, largest + 1))
    rows: int = height - step * size + 1
    columns: int = width - step * size + 1
    top, left = int(random.integers(rows)), int(random.integers(columns))
    square = photograph[top : top + step * size, left : left + step * size]
    square = square.reshape(size, step, size, step, 3).mean((1, 3)) * random.uniform(0.5, 1, 3)
    return square[:, ::-1] if random.random() < 0.5 else square
