"""What downloads have in common: the folder that keeps them, and silence while they are tried."""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["get_cache_folder", "quiet_loggers"]


def get_cache_folder(*parts: str) -> Path:
    """Return the folder that keeps what is downloaded or made between runs, or the folder ``parts`` below it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ecanet", *parts)


@contextmanager
def quiet_loggers(*names: str) -> Generator[None]:
    """Suppress what the loggers ``names`` of Python's `logging` say, except errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
