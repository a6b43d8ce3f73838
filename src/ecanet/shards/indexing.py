"""``index(folder)`` makes tar files in WebDataset's layout a set of shards, by writing an index beside them."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ecanet import progress
from ecanet.data import IMAGE_SUFFIXES, INDEX, PARTS, RECORD, ShardFile, hash_file
from ecanet.errors import ConfigError, DataError, summarize
from ecanet.shards.writing import write_index

__all__ = ["index", "read_records"]

PART_NAMES = {"train": ("train",), "held_out": ("val", "test")}
"""A shard belongs to the part whose word its name holds: ``imagenet1k-validation-03.tar`` is held out."""

LONGEST_LABEL = 20
"""Bytes of a ``.cls`` member."""

MOST_CLASSES = 10**6


def index(folder: str | Path, *, class_names: Sequence[str] | None = None) -> list[str]:
    """Write the index of the tar files in ``folder``, and return lines that say what they hold.

    A sample is an image and a ``.cls`` member of the same key, which follow each other; other members are passed over.

    Args:
        folder: holds ``*.tar``; a name with "train" is one of training images, with "val" or "test" of held-out ones.
        class_names: the names of the labels, in order; ``0``, ``1``, … by default.

    Raises:
        ConfigError: there are fewer names than labels, or there is an index already.
        DataError: a part has no shards, a tar file is broken, or an image and a label there do not belong together.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise ConfigError(f"{folder / INDEX}: there is an index already; to make another one, delete it first")
    names = sorted(path.name for path in folder.glob("*.tar")) if folder.is_dir() else []
    parts: dict[str, list[tuple[ShardFile, NDArray[np.void]]]] = {part: [] for part in PARTS}
    for name in progress.track(names, "indexing"):
        parts[find_part(folder, name)].append(scan(folder / name))
    for part, shards in parts.items():
        if not shards:
            words = " or ".join(PART_NAMES[part])
            raise DataError(f"{folder}: no tar file with {words} in its name, for the {part.replace('_', '-')} images")
    highest = max(int(records["label"].max()) for shards in parts.values() for _, records in shards)
    class_names = tuple(map(str, range(highest + 1))) if class_names is None else tuple(class_names)
    if len(class_names) <= highest:
        raise ConfigError(f"{len(class_names)} class names for labels up to {highest}; give one for each label")
    write_index(folder, class_names, parts, {})
    counts = {part: sum(file.images for file, _ in shards) for part, shards in parts.items()}
    return [
        f"{folder / INDEX}: {counts['train']:,} training and {counts['held_out']:,} held-out images of "
        f"{len(class_names)} classes in {len(names)} shards"
    ]


def find_part(folder: Path, name: str) -> str:
    """Return the part that the shard ``name`` belongs to.

    Raises:
        DataError: its name says none or both.
    """
    found = [part for part, words in PART_NAMES.items() if any(word in name.lower() for word in words)]
    if len(found) != 1:
        raise DataError(f"{folder / name}: its name says {len(found)} of train, val and test; rename it")
    return found[0]


def scan(path: Path) -> tuple[ShardFile, NDArray[np.void]]:
    """Return the entry and the records of the shard at ``path``.

    Raises:
        DataError: as for `read_records`, or the file's name has signs that an index cannot have.
    """
    records = read_records(path)
    size, sha256 = hash_file(path)
    try:
        return ShardFile(name=path.name, images=len(records), bytes=size, sha256=sha256), records
    except ValueError:
        raise DataError(f"{path}: a shard's name has letters, digits, '.', '-' and '_' alone; rename it") from None


def read_records(path: Path) -> NDArray[np.void]:
    """Return the records of the shard at ``path``, by reading its headers and labels.

    Raises:
        DataError: it is no tar file, or an image and a label there do not belong together.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return np.array(list_samples(archive), dtype=RECORD)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a shard ({summarize(error)})") from None


def list_samples(archive: tarfile.TarFile) -> list[tuple[int, int, int, int]]:
    """Return (0, label, offset, bytes) of each sample in ``archive``.

    Raises:
        ValueError: an image has no label, a label no image, or a key two of them.
    """
    rows: list[tuple[int, int, int, int]] = []
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    done: set[str] = set()
    for member in archive:
        folder, slash, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")
        key = f"{folder}{slash}{key}"
        if not member.isfile() or member.sparse is not None:  # a sparse file does not lie in one piece
            continue
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            if not member.size:
                raise ValueError(f"{member.name} is empty")
            if key in images or key in done:
                raise ValueError(f"{key} has two images")
            images[key] = (member.offset_data, member.size)
        elif suffix == "cls":
            if member.size > LONGEST_LABEL:
                raise ValueError(f"the label {member.name} has {member.size:,} bytes")
            if key in labels or key in done:
                raise ValueError(f"{key} has two labels")
            content = archive.extractfile(member)
            labels[key] = int(content.read()) if content is not None else -1
            if not 0 <= labels[key] < MOST_CLASSES:
                raise ValueError(f"the label {member.name} is {labels[key]}")
        if key in images and key in labels:
            rows.append((0, labels.pop(key), *images.pop(key)))
            done.add(key)
    for key in images:
        raise ValueError(f"{key} has no label ({key}.cls)")
    for key in labels:
        raise ValueError(f"{key} has a label and no image that can be read ({', '.join(IMAGE_SUFFIXES)})")
    return rows
