"""Select modules by ``where=``: a glob over their names, a class, or a function."""

import re
from collections.abc import Callable

from torch import nn

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over module names, a class, or a function of (name, module)."""


def is_selected(where: Where, name: str, module: nn.Module) -> bool:
    """Return whether ``where`` selects the module called ``name``."""
    if isinstance(where, str):
        return re.fullmatch(translate_glob(where), name) is not None
    return isinstance(module, where) if isinstance(where, type) else bool(where(name, module))


def translate_glob(glob: str) -> str:
    """Return the regular expression of a glob over dotted names: ``*`` is one part of a name, ``**`` any number.

    >>> pattern = translate_glob("layer4.*")
    >>> bool(re.fullmatch(pattern, "layer4.0")), bool(re.fullmatch(pattern, "layer4.0.bn3"))
    (True, False)
    """
    pieces = {"**": ".*", "*": r"[^.]*", "?": "[^.]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", glob))


def keep_outermost(names: list[str]) -> list[str]:
    """Return ``names`` without those that lie inside another of them."""
    chosen = set(names)
    return [n for n in names if not any(n[:i] in chosen for i, letter in enumerate(n) if letter == ".")]
