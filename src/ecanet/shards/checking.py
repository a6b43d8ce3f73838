"""``check(address)`` reads a set of shards from end to end, and says whether it is what its index says."""

from collections.abc import Iterator

import numpy as np

from ecanet import progress
from ecanet.data import Draw, ShardDataset, ShardFile, ShardSet, Unreadable, check_content, hash_file, read_shards
from ecanet.errors import DataError
from ecanet.shards.indexing import read_records

__all__ = ["check"]

NAMED = 3
"""The most problems that the message names."""


def check(address: str, *, images: bool = False) -> list[str]:
    """Check the set at ``address``, and return a line that says how much was read.

    The length and SHA-256 of each shard must be the index's, and the images and labels in it must lie where the index
    says. With ``images`` every image is decoded, too.

    Raises:
        DataError: something is not as it should be; the message counts the problems and names the first ones.
    """
    shards = read_shards(address)
    problems: list[str] = []
    start = 0
    for file in progress.track(shards.files, "checking"):
        problems += find_problems(shards, file, start)
        start += file.images
    if images and not problems:
        problems += find_unreadable(shards)
    if problems:
        more = f" (and {len(problems) - NAMED:,} more)" if len(problems) > NAMED else ""
        raise DataError(f"{len(problems):,} of the shards' checks failed: {'; '.join(problems[:NAMED])}{more}")
    size = sum(file.bytes for file in shards.files)
    what = "decoded" if images else "found where the index says"
    return [f"{address}: {len(shards.files)} shards, {size / 1e6:,.1f} MB; all {start:,} images are {what}"]


def find_problems(shards: ShardSet, file: ShardFile, start: int) -> Iterator[str]:
    """Yield what is wrong with ``file``, whose first image has the record ``start``."""
    try:
        path = shards.get_path(file)
        check_content(str(path), file, *hash_file(path))
        found = read_records(path)
    except OSError as error:
        yield f"{file.name}: {error.strerror}"
        return
    except DataError as error:
        yield str(error)
        return
    expected = shards.records[start : start + file.images]
    if len(found) != len(expected):
        yield f"{path}: {len(found):,} images instead of {len(expected):,}"
        return
    for field in ("label", "offset", "bytes"):
        if (wrong := np.flatnonzero(found[field] != expected[field])).size:
            at = int(wrong[0])
            yield f"{path}: image {at}: {field} {found[field][at]} instead of {expected[field][at]}"


def find_unreadable(shards: ShardSet) -> Iterator[str]:
    """Yield the message of each image that cannot be decoded."""
    for part in shards.parts:
        dataset = ShardDataset(shards, part, 3, lambda image: image)
        numbers = range(len(dataset))
        for at in progress.track(numbers, f"decoding {part}"):
            item = dataset[Draw(at, 0)]
            if isinstance(item, Unreadable):
                yield item.message
