"""Write one shard, whole or not at all, and the index of a set."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecanet.data import FORMAT, INDEX, PARTS, RECORD, RECORDS, ShardFile, hash_file, read_image
from ecanet.errors import DataError
from ecanet.report import replace_file, write_file
from ecanet.shards.plan import Source

__all__ = ["Written", "write_index", "write_shard"]

QUALITY = 95
"""JPEG quality of images that are made smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A shard that is written: its entry in the index, its records, the paths it holds, and what was left out."""

    file: ShardFile
    records: NDArray[np.void]
    lines: list[str]
    skipped: list[str]


def write_shard(path: Path, sources: Sequence[Source], size: int | None, *, skip: bool) -> Written:
    """Write the images ``sources`` to the tar file ``path``.

    Each image is decoded once, so that no broken one is packed. With ``size`` its short side has at most that many
    pixels afterwards. The same images give the same bytes.

    Raises:
        DataError: an image cannot be read, and such images are not skipped.
    """
    records: list[tuple[int, int, int, int]] = []
    lines: list[str] = []
    skipped: list[str] = []
    part = path.with_name(f".{path.name}.part")
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
            for source in sources:
                try:
                    content, suffix = read_source(source, size)
                except DataError as error:
                    if not skip:
                        raise DataError(f"{error}; --on-corrupt skip leaves such images out") from None
                    skipped.append(str(error))
                    continue
                key = f"{source.number:09d}"
                add(archive, f"{key}{suffix}", content)
                # A member ends with zeros up to a multiple of 512 bytes.
                offset = archive.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                records.append((0, source.label, offset, len(content)))
                add(archive, f"{key}.cls", str(source.label).encode())
                lines.append(f"{path.name}\t{key}\t{ascii(source.name)[1:-1]}\n")
        size_in_bytes, sha256 = hash_file(part)
        replace_file(part, path)
    finally:
        part.unlink(missing_ok=True)
    file = ShardFile(name=path.name, images=len(records), bytes=size_in_bytes, sha256=sha256)
    return Written(file=file, records=np.array(records, dtype=RECORD), lines=lines, skipped=skipped)


def read_source(source: Source, size: int | None) -> tuple[bytes, str]:
    """Return the content to pack of an image, and the suffix of its name."""
    pixels = read_image(source.path, 3)
    height, width = pixels.shape[1:]
    if size is None or min(height, width) <= size:
        return source.path.read_bytes(), source.path.suffix.lower()
    scale = size / min(height, width)
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
    )
    content = io.BytesIO()
    small.save(content, "JPEG", quality=QUALITY)
    return content.getvalue(), ".jpg"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without time, owner or anything else that would differ when it is packed again."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_index(
    folder: Path,
    class_names: Sequence[str],
    parts: Mapping[str, Sequence[tuple[ShardFile, NDArray[np.void]]]],
    about: Mapping[str, object],
) -> None:
    """Write the index of the set in ``folder``; ``parts`` has each shard with its records, ``about`` how it was made.

    The index is written last, so a folder without it is not a whole set.
    """
    tables: list[NDArray[np.void]] = []
    for shards in (parts[part] for part in PARTS):
        for _, records in shards:
            numbered = records.copy()
            numbered["shard"] = len(tables)
            tables.append(numbered)
    content = np.concatenate([np.zeros(0, RECORD), *tables]).tobytes()
    write_file(folder / RECORDS, content)
    size, sha256 = hash_file(folder / RECORDS)
    records_file = ShardFile(name=RECORDS, images=len(content) // RECORD.itemsize, bytes=size, sha256=sha256)
    values = {
        "format": FORMAT,
        "classes": list(class_names),
        **{part: [asdict(file) for file, _ in parts[part]] for part in PARTS},
        "records": asdict(records_file),
        "made": dict(about),
    }
    write_file(folder / INDEX, json.dumps(values, indent=1))
