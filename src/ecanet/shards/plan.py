"""Which images of a folder go into which shard: the same for the same folder, whoever packs it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ecanet.data import PARTS, find_images
from ecanet.errors import DataError
from ecanet.recipes import DataConfig

__all__ = ["Plan", "Settings", "Source", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides the content of a set beside its folder, as for `ecanet.shards.pack`."""

    size: int | None
    shard_bytes: int
    val_share: float | None
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One image to pack: its number in its part, its file and its class.

    ``name`` is its path below the packed folder, ``stamp`` its length and its time.
    """

    number: int
    path: Path
    name: str
    label: int
    stamp: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The shards of a set, by their file names, each with its images; `digest` identifies the whole."""

    folder: Path
    class_names: tuple[str, ...]
    parts: dict[str, dict[str, list[Source]]]
    notices: list[str]
    settings: Settings

    @property
    def digest(self) -> str:
        """Return a hash of the settings and of the paths, lengths and times of all files."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings)).encode())
        for part, shards in self.parts.items():
            for name, sources in shards.items():
                for source in sources:
                    line = f"{part} {name} {source.number} {source.label} {source.stamp} {source.name}\n"
                    digest.update(line.encode(errors="surrogatepass"))
        return digest.hexdigest()

    def count(self) -> int:
        """Return the number of images."""
        return sum(len(sources) for shards in self.parts.values() for sources in shards.values())


def make_plan(folder: Path, settings: Settings) -> Plan:
    """Return the plan of ``folder``, which has the layout of ``folder:PATH``.

    Training images are mixed, so that a shard has images of many classes; held-out ones keep the order of their names.

    Raises:
        DataError: the folder is not one of photographs.
    """
    config = DataConfig(name=f"folder:{folder}", val_share=settings.val_share)
    found = find_images(config, seed=settings.seed, train=True, split=None)
    assert found.train is not None
    parts: dict[str, dict[str, list[Source]]] = {}
    for part, (below, paths) in zip(PARTS, (found.train, found.held_out), strict=True):
        listed = [(below / path, label) for label in sorted(paths) for path in paths[label]]
        if part == "train":
            order = np.random.default_rng(settings.seed).permutation(len(listed))
            listed = [listed[int(at)] for at in order]
        name = "train" if part == "train" else "val"
        sources = [_look_at(folder, number, path, label) for number, (path, label) in enumerate(listed)]
        parts[part] = {
            f"{name}-{number:06d}.tar": group for number, group in enumerate(divide(sources, settings.shard_bytes))
        }
    return Plan(folder=folder, class_names=found.class_names, parts=parts, notices=found.notices, settings=settings)


def divide(sources: Sequence[Source], shard_bytes: int) -> Iterator[list[Source]]:
    """Yield ``sources`` in groups of about ``shard_bytes``, each of one image at least."""
    group: list[Source] = []
    filled = 0
    for source in sources:
        if group and filled + source.stamp[0] > shard_bytes:
            yield group
            group, filled = [], 0
        group.append(source)
        filled += source.stamp[0]
    if group:
        yield group


def _look_at(folder: Path, number: int, path: Path, label: int) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    name = path.relative_to(folder).as_posix()
    return Source(number=number, path=path, name=name, label=label, stamp=(status.st_size, status.st_mtime_ns))
