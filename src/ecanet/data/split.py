"""Split the images of a folder without train/ and val/ into training images and held-out ones, once for a run."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ecanet.data.listing import shorten
from ecanet.errors import DataError, summarize
from ecanet.recipes import read_json

__all__ = [
    "Split",
    "compare_split",
    "count_held_out",
    "drop_second_names",
    "leave_out_trained",
    "make_split",
    "read_split",
]

LARGEST_SPLIT = 2**24
"""Bytes of all paths in a split: checkpoints hold it, and may have 32 MiB of plain values."""

LARGEST_FILE = 8 * LARGEST_SPLIT
"""Bytes of a split in JSON, where a byte that is not ASCII may need six."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The images of a run by their paths below the data's folder, such as ``cat/1.jpg``.

    A split that holds out nothing is about other images than its run's. To evaluate, all of them are taken except those
    whose paths are in ``train``; to train, none of these paths is held out.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, sorted."""
        return tuple(sorted({path.partition("/")[0] for path in self.train}))

    def to_dict(self) -> dict[str, list[str]]:
        """Return the split as plain values, for JSON and for checkpoints."""
        return {"train": list(self.train), "held_out": list(self.held_out)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Split":
        """Return the split that `to_dict` made ``values`` of.

        Raises:
            DataError: ``values`` are something else, or a path leads out of the data's folder.
        """
        parts = [values.get(name) for name in ("train", "held_out")] if isinstance(values, Mapping) else [None]
        for part in parts:
            paths = cast(list[object], part) if isinstance(part, list) else [None]
            if not all(isinstance(path, str) and _is_inside(path) for path in paths):
                raise DataError("the list of a run's images is broken")
        train, held_out = cast(list[list[str]], parts)
        return cls(train=tuple(train), held_out=tuple(held_out))


def count_held_out(images: int, share: float) -> int:
    """Return how many of a class's ``images`` are held out: the nearest to ``share``, leaving one in each part.

    >>> [count_held_out(n, 0.2) for n in (2, 3, 7, 8, 100)]
    [1, 1, 1, 2, 20]
    """
    return min(max(1, int(share * images + 0.5)), images - 1)


def make_split(
    images: Mapping[str, Sequence[str]], share: float, *, seed: int, folder: Path, seen: Collection[str] = ()
) -> Split:
    """Return a split of the ``images`` of each class that holds out about ``share`` of every class.

    The images of a class are ordered by a hash of the seed and their paths, and the first are held out. So neither
    the order in which files are listed nor another class's files change anything. No image in ``seen`` is held out:
    the run's first weights were trained on them.

    Raises:
        DataError: a class has a single image or has been seen as a whole, or the paths are too long for a checkpoint.
    """
    train: list[str] = []
    held_out: list[str] = []
    for name, paths in images.items():
        if len(paths) == 1:
            raise DataError(
                f"{folder / name}: only one image, and a class needs one to train on and one to hold out; add images, "
                "or remove the folder"
            )
        order = sorted(paths, key=lambda path: (path in seen, _hash(seed, path)))
        count = min(count_held_out(len(paths), share), sum(path not in seen for path in paths))
        if not count:
            raise DataError(
                f"{folder / name}: every image has the path of one that the weights were trained on, so none can be "
                f"held out; add images, or make {folder}/train/CLASS/… and {folder}/val/CLASS/…"
            )
        held_out += sorted(order[:count])
        train += sorted(order[count:])
    size = sum(len(path.encode(errors="surrogatepass")) for path in train + held_out)
    if size > LARGEST_SPLIT:
        raise DataError(
            f"{folder}: {len(train) + len(held_out):,} images are too many to split here; make {folder}/train/CLASS/… "
            f"and {folder}/val/CLASS/…"
        )
    return Split(train=tuple(train), held_out=tuple(held_out))


def read_split(path: Path) -> Split | None:
    """Return the split that a run has written to ``path``, or None if there is no such file.

    Raises:
        DataError: the file is not a split.
    """
    try:
        return Split.from_dict(cast(Mapping[str, object], read_json(path, largest=LARGEST_FILE)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not the list of a run's images ({summarize(error)}); restore it") from None


def compare_split(
    split: Split, found: Mapping[str, Sequence[str]], folder: Path, *, train: bool, skip: bool
) -> list[str]:
    """Return a line about the images in ``folder`` that are not in the run's ``split``, if there are any.

    Raises:
        DataError: an image that is needed is gone, and such files are not skipped.
    """
    there = {path for paths in found.values() for path in paths}
    needed = {*split.held_out, *(split.train if train else ())}
    if (gone := sorted(needed - there)) and not skip:
        more = f" (and {len(gone) - 1:,} more)" if len(gone) > 1 else ""
        remedy = "a run continues only with all of its images" if train else "--on-corrupt skip evaluates the others"
        raise DataError(f"{folder / gone[0]}{more}: in the run's split, but gone; put it back ({remedy})")
    new = sorted(there - {*split.train, *split.held_out})
    if not new:
        return []
    return [f"not used: {_count(new)} of {folder} that the run's split does not have: {shorten(new)}"]


def leave_out_trained(paths: list[str], split: Split | None, folder: Path) -> tuple[list[str], list[str]]:
    """Return ``paths`` without the training images of ``split``, and a line about them if there are any.

    Raises:
        DataError: nothing is left.
    """
    trained = set(split.train) if split is not None else set[str]()
    rest = [path for path in paths if path not in trained]
    if not rest:
        raise DataError(f"{folder}: every image has the path of one that the run was trained on; evaluate other images")
    same = [path for path in paths if path in trained]
    if not same:
        return rest, []
    return rest, [
        f"not evaluated: {_count(same)} of {folder} with the paths of images that the run was trained on: "
        f"{shorten(same)}"
    ]


def drop_second_names(found: Mapping[str, Sequence[str]], folder: Path, dropped: list[str]) -> dict[str, list[str]]:
    """Return ``found`` without second names (links) of the same file, which could be in both parts of a split.

    Raises:
        DataError: a file is in two classes.
    """
    first: dict[tuple[int, int], str] = {}
    kept: dict[str, list[str]] = {name: [] for name in found}
    for name, paths in found.items():
        for path in paths:
            try:
                status = (folder / path).stat()
            except OSError:  # a link to nothing: reading it fails later, as for every unreadable image
                kept[name].append(path)
                continue
            known = first.setdefault((status.st_dev, status.st_ino), path)
            if known == path:
                kept[name].append(path)
            elif known.partition("/")[0] == name:
                dropped.append(path)
            else:
                raise DataError(f"{folder / path} and {known} are the same file; an image has one class, so remove one")
    return kept


def _count(paths: Sequence[str]) -> str:
    return f"{len(paths):,} image{'s' * (len(paths) > 1)}"


def _hash(seed: int, path: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{path}".encode(errors="surrogatepass"), digest_size=16).digest()


def _is_inside(path: str) -> bool:
    """Return whether ``path`` is a file below a class's folder."""
    parts = path.split("/")
    return len(parts) > 1 and "\0" not in path and not {"", ".", ".."} & set(parts)
