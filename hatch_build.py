"""Make the README's links absolute for a package index, and list the project's links, from one address.

The address is ``[tool.ecanet] address`` in pyproject.toml. As long as it is empty, links stay relative, and `make dist`
says so.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent
PICTURES = (".png", ".jpg", ".svg")
NOT_SET = "the project's address is not set ([tool.ecanet] address in pyproject.toml): README's links stay relative"


class Links(MetadataHookInterface):
    """Add the README and the project's links to the metadata of the wheel and the source archive."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in ``readme``, and ``urls`` if the address is set."""
        text, address = (ROOT / "README.md").read_text(encoding="utf-8"), read_address()
        if address:
            text = make_absolute(text, address, f"v{read_version()}")
            metadata["urls"] = list_urls(address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def read_address() -> str:
    """Return the address of the project's repository, or an empty string."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["ecanet"]["address"].rstrip("/")


def read_version() -> str:
    """Return the version in ``src/ecanet/__init__.py``, which is not imported: it would need torch."""
    text = (ROOT / "src" / "ecanet" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    return match[1]


def make_absolute(text: str, address: str, tag: str) -> str:
    """Return Markdown whose links to files of the repository lead to ``address``, as they were at ``tag``."""

    def replace(match: re.Match[str]) -> str:
        path, fragment = match[1], match[2] or ""
        view = "raw" if path.endswith(PICTURES) else "blob"
        return f"]({address}/{view}/{tag}/{path}{fragment})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", replace, text)


def list_urls(address: str) -> dict[str, str]:
    """Return the links that an index shows beside the project."""
    return {
        "Homepage": address,
        "Documentation": f"{address}/tree/main/docs",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


if __name__ == "__main__" and not read_address():  # `make dist`
    print(NOT_SET, file=sys.stderr)
