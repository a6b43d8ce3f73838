"""Data for runs.

Read downward: `builder` (`build` finds the loader for a name), `boxes` (detection), `scenes` (generated detection
scenes), `annotations` (COCO files), `images` (classification), `sources` (data sets in memory and in folders),
`pictures` (reads one image file).
"""

from ecanet.data import boxes
from ecanet.data.annotations import Annotations, encode, thin
from ecanet.data.builder import build
from ecanet.data.images import derive_seed, fitted
from ecanet.data.pictures import read_image
from ecanet.data.sources import IMAGE_SUFFIXES, DataSpec, check_classes

__all__ = [
    "IMAGE_SUFFIXES",
    "Annotations",
    "DataSpec",
    "boxes",
    "build",
    "check_classes",
    "derive_seed",
    "encode",
    "fitted",
    "read_image",
    "thin",
]
