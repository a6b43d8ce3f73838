"""Images in shards, read one by one, and the order in which an epoch takes them.

Random access lets these images go through the same samplers, transforms and checkpoints as a folder's. The order keeps
the reads together: at any time an epoch reads from few shards.
"""

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ecanet.data.folders import Transform
from ecanet.data.pictures import Unreadable, decode_image
from ecanet.data.randomness import Draw, use_sample_stream
from ecanet.data.shard_files import ShardSet
from ecanet.errors import DataError

__all__ = ["ShardDataset", "mix_shards"]

LANES = 32
"""The most lanes of `mix_shards`, a power of two."""

WINDOW = 2
"""Shards of one lane whose images are mixed."""


class ShardDataset(Dataset[tuple[Tensor, int, Draw] | Unreadable]):
    """The images of one part of a set, "train" or "held_out", each with its label and the sampler's draw.

    Images are uint8 tensors (C, H, W) after ``transform``, whose random numbers depend on ``seed`` and the draw alone.

    Raises:
        DataError: a shard on this machine does not have the length that the index says.
    """

    def __init__(self, shards: ShardSet, part: str, channels: int, transform: Transform, *, seed: int = 0):
        self.shards, self.channels, self.transform, self.seed = shards, channels, transform, seed
        shards.check_lengths(part)
        self.records = shards.get_records(part)
        self.sizes = [file.images for file in shards.parts[part]]

    def __len__(self) -> int:
        return len(self.records)

    def get_labels(self) -> list[int]:
        """Return the label of each image."""
        return self.records["label"].tolist()

    def get_order(self, seed: int) -> NDArray[np.int64]:
        """Return the indices of all images in the order in which an epoch takes them."""
        return mix_shards(self.sizes, seed)

    def name_image(self, index: int) -> str:
        """Return the shard of an image, and where it begins there."""
        record = self.records[index]
        file = self.shards.files[int(record["shard"])]
        return f"{self.shards.address}/{file.name}, byte {int(record['offset']):,}"

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, Draw] | Unreadable:
        record = self.records[draw.image]
        try:
            image = decode_image(self.shards.read(record), self.name_image(draw.image), self.channels)
        except (DataError, OSError) as error:
            return Unreadable(str(error))
        with use_sample_stream(self.seed, draw.epoch, draw.image, draw.repeat):
            return self.transform(image), int(record["label"]), draw


def mix_shards(sizes: list[int], seed: int) -> NDArray[np.int64]:
    """Return a random order of the images of shards with ``sizes`` images each, all of them exactly once.

    The images are cut into lanes of equal length, a power of two of them, which stay the same in every epoch. A lane
    takes its shards in a random order and mixes the images of `WINDOW` neighbours, and the lanes take turns. So a
    process that takes every W-th image, where W is a power of two up to 32, reads the shards of 32 / W lanes only. The
    order does not depend on the number of processes.

    >>> sorted(mix_shards([3, 2, 3], seed=1).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    lanes = min(LANES, 1 << (max(1, len(sizes)).bit_length() - 1))
    random = np.random.default_rng(seed)
    images: list[NDArray[np.int64]] = []
    turns: list[NDArray[np.int64]] = []
    for lane in cut(sizes, lanes):
        order = [lane[int(at)] for at in random.permutation(len(lane))]
        for at in range(0, len(order), WINDOW):
            window = np.concatenate([np.arange(*part) for part in order[at : at + WINDOW]])
            images.append(random.permutation(window))
        turns.append(np.arange(sum(end - start for start, end in lane)))
    # A stable sort by turn: the lanes alternate.
    return np.concatenate(images)[np.argsort(np.concatenate(turns), kind="stable")]


def cut(sizes: list[int], lanes: int) -> list[list[tuple[int, int]]]:
    """Return the parts of shards of each lane, as (first image, one past the last).

    The first lanes have one image more if the images cannot be cut evenly, so the last turn is in order, too.

    >>> cut([3, 2, 4], 2)
    [[(0, 3), (3, 5)], [(5, 9)]]
    """
    share, more = divmod(sum(sizes), lanes)
    edges = [lane * share + min(lane, more) for lane in range(lanes + 1)]
    starts = list(accumulate(sizes, initial=0))
    parts: list[list[tuple[int, int]]] = []
    for low, high in pairwise(edges):
        overlaps = ((max(start, low), min(end, high)) for start, end in pairwise(starts))
        parts.append([(start, end) for start, end in overlaps if start < end])
    return parts
