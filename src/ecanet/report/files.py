"""Write files completely or not at all, so that they survive a power loss; and say which disk is full."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ecanet.errors import ConfigError

__all__ = ["describe_disk", "replace_file", "write_file"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` and make its folder; if writing fails, an older file keeps its content.

    Raises:
        ConfigError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            # Temporary files are readable by their owner only.
            temporary.chmod(0o644)
            replace_file(temporary, path)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); {describe_disk(path.parent)}") from error
        finally:
            temporary.unlink(missing_ok=True)


def replace_file(temporary: Path, path: Path) -> None:
    """Rename the finished file ``temporary`` to ``path``; after a power loss, the old or the new file is there."""
    _synchronize(temporary)
    temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        _synchronize(path.parent)


def describe_disk(folder: Path) -> str:
    """Return how much room the disk of ``folder`` has, and what to do, as the end of a sentence."""
    room = shutil.disk_usage(folder)
    return f"{room.free / 1e6:,.0f} of {room.total / 1e6:,.0f} MB are free on the disk of {folder}; make room there"


def _synchronize(path: Path) -> None:
    """Wait until the disk has the content of the file or folder ``path``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
