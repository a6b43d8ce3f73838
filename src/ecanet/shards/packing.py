"""``pack(folder, out)`` packs the photographs of a folder into shards: in parallel, and it goes on after a stop."""

import json
import os
import shutil
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np

from ecanet import progress
from ecanet.data import INDEX, LARGEST_INDEX, PARTS, RECORD, ShardFile
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import read_json
from ecanet.report import describe_disk, write_file
from ecanet.shards.plan import Plan, Settings, Source, make_plan
from ecanet.shards.writing import Written, write_index, write_shard

__all__ = ["pack"]

STATE = ".packing"
"""The folder with what is done so far; it is removed at the end."""

PLAN = "plan.json"

SOURCES = "sources.txt"
"""This file has a line for each image: its shard, its key there, and its path in the packed folder."""

SHARD_BYTES = 64 * 2**20


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    val_share: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_corrupt: str = "error",
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Pack the photographs of ``folder`` into shards in ``out``, and return lines that say what was done.

    Given again after a stop, the same call goes on, and the files are the same, byte for byte, as without the stop.

    Args:
        folder: photographs in the layout of ``folder:PATH``; a flat folder is split once, and the set keeps the split.
        out: the folder of the set.
        size: the short side of larger images in pixels; they are stored as JPEG of quality 95. None keeps every file as
            it is.
        val_share: as ``data.val_share`` of a recipe.
        seed: decides the split and the order of the training images.
        workers: number of processes; all cores by default.
        on_corrupt: "skip" leaves images out that cannot be read, and names them.
        shard_bytes: size of the files in a shard, before they are made smaller.

    Raises:
        ConfigError: a value does not fit, or ``out`` holds something else or cannot be written.
        DataError: the folder is not one of photographs, or an image cannot be read.
    """
    if any(number is not None and number < 1 for number in (size, workers, shard_bytes)):
        raise ConfigError(f"size, workers and shard_bytes are positive, got {size}, {workers} and {shard_bytes}")
    if on_corrupt not in ("error", "skip"):
        raise ConfigError(f"on_corrupt is 'error' or 'skip', got {on_corrupt!r}")
    plan = make_plan(Path(folder), Settings(size=size, shard_bytes=shard_bytes, val_share=val_share, seed=seed))
    out = Path(out)
    with _lock(out):
        if not _claim(out, plan):
            return [f"{out} is whole: {plan.count():,} images are packed already"]
        written = _write_shards(plan, out, workers or os.cpu_count() or 1, skip=on_corrupt == "skip")
        return [*plan.notices, *_finish(plan, out, written)]


@contextmanager
def _lock(out: Path) -> Generator[None]:
    """Keep other calls out of ``out``: two at once would write the same files.

    Raises:
        ConfigError: another call has it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"{out}: another process packs there; wait for it, or stop it first") from None
    except OSError as error:
        room = f"; {describe_disk(out)}" if out.is_dir() else ""
        raise ConfigError(f"{out}: shards cannot be written there ({error.strerror}){room}") from None


def _claim(out: Path, plan: Plan) -> bool:
    """Return whether there is anything to do in ``out``, which then belongs to ``plan``.

    Raises:
        ConfigError: ``out`` holds another set, or files of others.
    """
    done = out / INDEX
    owner = done if done.exists() else out / STATE / PLAN
    if owner.exists():
        try:
            values = cast(dict[str, dict[str, object]], read_json(owner, largest=LARGEST_INDEX))
            made = values.get("made", values)
            same, settings = made.get("digest") == plan.digest, json.dumps(made.get("settings"))
        except (ValueError, AttributeError):
            raise ConfigError(f"{owner}: damaged; delete {out} and pack again") from None
        if not same:
            raise ConfigError(
                f"{out} holds another set: other photographs, or other settings ({settings}); choose another folder, "
                "or delete it"
            )
        return not done.exists()
    if foreign := sorted(path.name for path in out.iterdir() if path.name not in (".lock", STATE)):
        raise ConfigError(f"{out}: holds {foreign[0]}, and shards need a folder of their own")
    write_file(owner, json.dumps({"digest": plan.digest, "settings": asdict(plan.settings)}))
    return True


def _write_shards(plan: Plan, out: Path, workers: int, *, skip: bool) -> dict[str, Written]:
    """Write the shards that are missing, and return all of them by name."""
    for left_over in out.glob(".*.part"):  # what a killed process was writing
        left_over.unlink()
    shards = {name: sources for part in PARTS for name, sources in plan.parts[part].items()}
    written = {name: done for name in shards if (done := _read_state(out, name)) is not None}
    missing = {name: sources for name, sources in shards.items() if name not in written}
    workers = min(workers, len(missing))
    with progress.show("packing", plan.count()) as advance:
        advance(sum(len(shards[name]) for name in written))
        for name, done in _run(out, missing, workers, plan.settings.size, skip=skip):
            _write_state(out, done)
            written[name] = done
            advance(len(shards[name]))
    return written


def _run(
    out: Path, missing: Mapping[str, Sequence[Source]], workers: int, size: int | None, *, skip: bool
) -> Iterator[tuple[str, Written]]:
    """Yield the name and the result of each shard as soon as it is written."""
    if workers <= 1:
        for name, sources in missing.items():
            yield name, write_shard(out / name, sources, size, skip=skip)
        return
    # Ctrl-C reaches all processes; this one alone answers it, and the others finish their shard.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        running = {pool.submit(write_shard, out / name, s, size, skip=skip): name for name, s in missing.items()}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{out}: a process that packs was killed, perhaps for its memory; use fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_state(out: Path, done: Written) -> None:
    """Keep what is known of a shard until the index is written."""
    values = asdict(done) | {"records": done.records.tolist()}
    write_file(out / STATE / f"{done.file.name}.json", json.dumps(values))


def _read_state(out: Path, name: str) -> Written | None:
    """Return what is known of the shard ``name``, or None if it is not there as it was written."""
    try:
        values = cast(dict[str, Any], read_json(out / STATE / f"{name}.json", largest=LARGEST_INDEX))
        records = np.array([tuple(record) for record in values["records"]], dtype=RECORD)
        file = ShardFile(**values["file"])
        done = Written(file=file, records=records, lines=values["lines"], skipped=values["skipped"])
        return done if (out / name).stat().st_size == done.file.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finish(plan: Plan, out: Path, written: Mapping[str, Written]) -> list[str]:
    """Write the index, remove the state, and return lines about the set."""
    parts = {part: [written[name] for name in shards] for part, shards in plan.parts.items()}
    for part, shards in parts.items():
        if not sum(one.file.images for one in shards):
            raise DataError(f"{plan.folder}: not one image of the {part.replace('_', '-')} part could be read")
    everything = [one for part in PARTS for one in parts[part]]
    write_file(out / SOURCES, "".join(line for one in everything for line in one.lines))
    about = {"digest": plan.digest, "settings": asdict(plan.settings)}
    pairs = {part: [(one.file, one.records) for one in shards] for part, shards in parts.items()}
    write_index(out, plan.class_names, pairs, about)
    shutil.rmtree(out / STATE)
    counts = {part: sum(one.file.images for one in shards) for part, shards in parts.items()}
    size = sum(one.file.bytes for one in everything)
    return [
        *(f"skipped: {message}" for one in everything for message in one.skipped),
        f"{out}: {counts['train']:,} training and {counts['held_out']:,} held-out images of {len(plan.class_names)} "
        f"classes in {len(everything)} shards, {size / 1e6:,.1f} MB",
    ]
