"""Read JSON that anybody may have written: one error for everything that can be wrong with it."""

import json
from pathlib import Path

__all__ = ["parse_json", "read_json"]

LARGEST_FILE = 2**24
"""Bytes of a file. Python needs up to twenty times as much memory for what is in it."""


def read_json(path: Path, *, largest: int = LARGEST_FILE) -> object:
    """Return the content of the JSON file at ``path``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no regular file, larger than ``largest`` bytes, or not JSON.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for someone who writes to it
        raise ValueError("it is no file, but a folder, a pipe, a socket or a device")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return parse_json(data)


def parse_json(text: str | bytes) -> object:
    """Return the value of the JSON ``text``.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
        ...
    ValueError: its lists lie too deep in one another

    Raises:
        ValueError: it is not JSON, or nested too deep, or holds a number of more than 4,300 digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists lie too deep in one another") from None
