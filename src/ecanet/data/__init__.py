"""Data sets, as Lightning data modules.

`builder` finds the loader of a data set by its name. The files, in reading order: `builder`, `boxes` (detection),
`images` (classification), `augmentation`, `module` (what both have in common), `samplers` (which images form a
batch), `scenes` (generated detection data), `annotations` (a COCO data set), `coco` (COCO's file format), `shards`
and `shard_files` (tar files), `folders` (one folder per class), `sources` (small data sets in memory), `glyphs` and
`garments` (generated ones), `typefaces` and `photographs` (what they are made from), `cache` (keeps generated data),
`split` (which images of a flat folder are held out), `listing` (the files below class folders), `pictures` (reads one
image file), `randomness` (an image's random numbers).
"""

from ecanet.data.annotations import Annotations
from ecanet.data.augmentation import build_eval_transform
from ecanet.data.boxes import DetectionData, Target, has_boxes
from ecanet.data.builder import build
from ecanet.data.coco import RunLengths, encode_mask, find_size_problem
from ecanet.data.folders import FolderDataset, find_images
from ecanet.data.images import ClassificationData
from ecanet.data.pictures import IMAGE_SUFFIXES, Unreadable, read_image, to_tensor
from ecanet.data.randomness import Draw, derive_seed, use_sample_stream
from ecanet.data.shard_files import (
    FORMAT,
    INDEX,
    LARGEST_INDEX,
    PARTS,
    RECORD,
    RECORDS,
    ShardFile,
    ShardSet,
    check_content,
    hash_file,
    read_shards,
)
from ecanet.data.shards import ShardDataset
from ecanet.data.sources import DataSpec, MemoryDataset, check_classes
from ecanet.data.split import Split, read_split

__all__ = [
    "FORMAT",
    "IMAGE_SUFFIXES",
    "INDEX",
    "LARGEST_INDEX",
    "PARTS",
    "RECORD",
    "RECORDS",
    "Annotations",
    "ClassificationData",
    "DataSpec",
    "DetectionData",
    "Draw",
    "FolderDataset",
    "MemoryDataset",
    "RunLengths",
    "ShardDataset",
    "ShardFile",
    "ShardSet",
    "Split",
    "Target",
    "Unreadable",
    "build",
    "build_eval_transform",
    "check_classes",
    "check_content",
    "derive_seed",
    "encode_mask",
    "find_images",
    "find_size_problem",
    "has_boxes",
    "hash_file",
    "read_image",
    "read_shards",
    "read_split",
    "to_tensor",
    "use_sample_stream",
]
