"""An extension for mkdocstrings: examples in docstrings (``>>>``) become code blocks."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*\n?)+", re.MULTILINE)


class Doctests(Extension):
    """Fence each example of a docstring, so that its output is not read as Markdown."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda m: f"```pycon\n{m[0].strip()}\n```\n\n", obj.docstring.value)
