"""The files of a set of shards: tar files, and an index that says where each image begins.

A set is a folder, here or at an address that fsspec can read (``s3://…``):

- ``NAME.tar``: images and labels in WebDataset's layout: ``KEY.jpg``, then ``KEY.cls`` with the label as text
- ``index.bin``: `RECORD` for each image, the training images first
- ``index.json``: class names, and the length and SHA-256 of each file
"""

import functools
import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ecanet.errors import DataError, summarize
from ecanet.models import get_cache_folder
from ecanet.recipes import parse_json

__all__ = [
    "FORMAT",
    "INDEX",
    "LARGEST_INDEX",
    "PARTS",
    "RECORD",
    "RECORDS",
    "ShardFile",
    "ShardSet",
    "check_content",
    "hash_file",
    "read_shards",
]

FORMAT = "ecanet shards 1"
INDEX, RECORDS = "index.json", "index.bin"
PARTS = ("train", "held_out")

RECORD = np.dtype([("shard", "<u4"), ("label", "<u4"), ("offset", "<u8"), ("bytes", "<u8")])
"""One image: the number of its shard, its class, and where it lies in that file."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""A file's name has no slash: nothing outside the set's folder is read or written."""

LARGEST_INDEX = 2**27
"""Bytes of ``index.json``: 100,000 shards need 15 MB."""

FREE_SHARE = 0.1
"""Share of the disk that copies of remote shards leave free."""

CHUNK = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """One file of a set as its index describes it; ``images`` is how many it holds."""

    name: str
    images: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.name), str) or not FILE_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not the name of a shard")
        if not all(isinstance(cast(object, n), int) and n >= 0 for n in (self.images, self.bytes)):
            raise ValueError(f"{self.name}: images and bytes are not counts")


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A set of shards at ``address``; ``records`` are those of `files`, of the training images first."""

    address: str
    class_names: tuple[str, ...]
    parts: Mapping[str, tuple[ShardFile, ...]]
    records: NDArray[np.void]

    @functools.cached_property
    def files(self) -> tuple[ShardFile, ...]:
        """Return the shards of both parts, in the order in which records number them."""
        return tuple(file for part in PARTS for file in self.parts[part])

    def get_records(self, part: str) -> NDArray[np.void]:
        """Return the records of the images of ``part``, "train" or "held_out"."""
        first = sum(file.images for file in self.parts["train"])
        return self.records[:first] if part == "train" else self.records[first:]

    def read(self, record: np.void) -> bytes:
        """Return the content of the image with this ``record``.

        Raises:
            DataError: as for `get_path`.
            OSError: the shard cannot be read.
        """
        file = self.files[int(record["shard"])]
        try:
            return read_part(self.get_path(file), record)
        except FileNotFoundError:  # another process has just made room by deleting this copy
            return read_part(self.get_path(file), record)

    def check_lengths(self, part: str) -> None:
        """Check that the shards of ``part`` on this machine have the lengths of the index, before any is read.

        Raises:
            DataError: a shard is missing, was cut, or is another one.
        """
        for file in () if is_remote(self.address) else self.parts[part]:
            path = self.get_path(file)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); copy or pack the set again") from None
            check_length(str(path), file, size)

    def get_path(self, file: ShardFile) -> Path:
        """Return where ``file`` lies on this machine; one that lies elsewhere is copied into the cache first.

        The oldest copies give way when less than a tenth of the disk would be free.

        Raises:
            DataError: it cannot be read there, or its content is not that of the index.
        """
        return get_local_path(self.address, file)


def read_part(path: Path, record: np.void) -> bytes:
    """Return the bytes of the shard at ``path`` that ``record`` names."""
    with path.open("rb") as shard:
        shard.seek(int(record["offset"]))
        return shard.read(int(record["bytes"]))


def is_remote(address: str) -> bool:
    """Return whether ``address`` is one of another file system, such as ``s3://bucket/set``."""
    return "://" in address


def get_local_path(address: str, file: ShardFile) -> Path:
    """Return the path of ``file`` of the set at ``address``, as for `ShardSet.get_path`."""
    if not is_remote(address):
        return Path(address) / file.name
    from filelock import FileLock

    folder = get_cache_folder("shards", hashlib.sha256(address.encode()).hexdigest()[:16])
    path = folder / f"{file.sha256[:16]}-{file.name}"  # a set that was packed anew has other contents
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{file.name}.lock"):  # the workers of all processes ask for the same shards
        if not path.exists():
            with FileLock(folder.parent / ".room.lock"):
                make_room(folder.parent, file.bytes)
            copy_here(f"{address}/{file.name}", path, file)
    return path


def make_room(folder: Path, needed: int) -> None:
    """Delete the oldest copies of shards below ``folder`` until `FREE_SHARE` of the disk is free beside ``needed``.

    The disk is what this user may fill: blocks kept for the administrator are not counted.
    """
    copies = sorted(folder.glob("*/*.tar"), key=lambda path: path.stat().st_mtime)
    for path in copies:
        room = shutil.disk_usage(folder)
        if room.free - needed > FREE_SHARE * (room.used + room.free):
            break
        path.unlink(missing_ok=True)


def copy_here(address: str, path: Path, file: ShardFile) -> None:
    """Copy what is at ``address`` to ``path``, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    digest, size = hashlib.sha256(), 0
    try:
        with open_remote(address) as source, part.open("wb") as target:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
                size += len(chunk)
                if size > file.bytes:
                    break
            target.flush()
            os.fsync(target.fileno())  # later runs take what has the name for whole
        check_content(address, file, size, digest.hexdigest())
        part.replace(path)
    except DataError:
        raise
    except Exception as error:  # as in `open_remote`
        raise DataError(f"{address}: cannot be copied to {path.parent} ({summarize(error)})") from None
    finally:
        part.unlink(missing_ok=True)


def open_remote(address: str) -> BinaryIO:
    """Return the file at ``address`` opened by fsspec, which PyTorch installs.

    Raises:
        DataError: it cannot be opened.
    """
    fsspec = cast(Any, importlib.import_module("fsspec"))  # it has no types

    try:
        return cast(BinaryIO, fsspec.open(address, "rb").open())
    except Exception as error:  # each of fsspec's file systems raises exceptions of its own
        raise DataError(f"{address}: cannot be read ({type(error).__name__}: {summarize(error)})") from None


def check_content(where: str, file: ShardFile, size: int, sha256: str) -> None:
    """Raise DataError if a file's length or digest is not the index's."""
    check_length(where, file, size)
    if sha256 != file.sha256:
        raise DataError(f"{where}: its content is not what was packed (another SHA-256); copy or pack the set again")


def check_length(where: str, file: ShardFile, size: int) -> None:
    """Raise DataError if a file's length is not the index's."""
    if size != file.bytes:
        raise DataError(f"{where}: {size:,} bytes instead of {file.bytes:,}; copy or pack the set again")


def hash_file(path: Path) -> tuple[int, str]:
    """Return the length of the file ``path`` and its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def read_shards(address: str) -> ShardSet:
    """Return the set of shards at ``address``: a folder, or an address for fsspec.

    Raises:
        DataError: it has no index, or the index is broken.
    """
    address = address.rstrip("/") if is_remote(address) else str(Path(address).expanduser())
    where = f"{address}/{INDEX}"
    content = read_start(address, INDEX, LARGEST_INDEX)
    try:
        values = cast(dict[str, Any], parse_json(content))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, expected {FORMAT!r}")
        names = cast("list[str]", values["classes"])
        if type(names) is not list or len(names) < 2 or {type(name) for name in names} != {str}:
            raise ValueError("the class names are not two strings or more")
        parts = {part: tuple(ShardFile(**file) for file in values[part]) for part in PARTS}
        records = ShardFile(**values["records"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not an index of shards ({summarize(error)}); pack the set again") from None
    files = [file for part in PARTS for file in parts[part]]
    images = sum(file.images for file in files)
    if records.name != RECORDS or records.bytes != images * RECORD.itemsize:
        raise DataError(f"{where}: {images:,} images do not fit {RECORDS} of {records.bytes:,} bytes; pack again")
    path = get_local_path(address, records)
    check_content(str(path), records, *hash_file(path))
    table = np.memmap(path, RECORD, mode="r") if images else np.zeros(0, RECORD)
    check_records(where, table, files, len(names))
    return ShardSet(address=address, class_names=tuple(names), parts=parts, records=table)


def read_start(address: str, name: str, limit: int) -> bytes:
    """Return the content of a file of the set at ``address``.

    Raises:
        DataError: there is no such file, or it has more than ``limit`` bytes.
    """
    try:
        with open_remote(f"{address}/{name}") if is_remote(address) else (Path(address) / name).open("rb") as file:
            content = file.read(limit + 1)
    except DataError:
        raise
    except OSError as error:
        how = "ecanet shards pack makes one of a folder, ecanet shards index of tar files that are there"
        raise DataError(f"{address}: no set of shards ({name}: {error.strerror}); {how}") from None
    if len(content) > limit:
        raise DataError(f"{address}/{name}: more than {limit:,} bytes, which is no index of shards")
    return content


def check_records(where: str, records: NDArray[np.void], files: Sequence[ShardFile], classes: int) -> None:
    """Raise DataError if an image lies outside its shard, in another one than counted, or has an unknown class."""
    start = 0
    for number, file in enumerate(files):
        part = records[start : start + file.images]
        ends = part["offset"] + part["bytes"]
        right = (part["shard"] == number) & (part["label"] < classes)
        right &= (ends <= file.bytes) & (ends > part["offset"])  # a sum beyond 2^64 would begin at 0 again
        if not right.all():
            at = start + int(np.argmin(right))
            raise DataError(f"{where}: the record of image {at:,} does not fit its shard; pack the set again")
        start += file.images
