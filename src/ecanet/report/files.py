"""Write files completely or not at all."""

import tempfile
from pathlib import Path

__all__ = ["write_file"]


def write_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` and make its folder; if writing fails, an older file keeps its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        file.write(data)
    try:
        # Temporary files are readable by their owner only.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
