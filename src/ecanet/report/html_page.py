"""The layout that all of the package's HTML pages share."""

import html
from collections.abc import Iterable, Mapping, Sequence

from ecanet.recipes import Recipe
from ecanet.report.settings import show_settings

__all__ = ["Section", "make_table", "page"]

Section = tuple[str, str, str]
"""A heading, a note below it, and a body in HTML."""

LONGEST_WORD = 24
"""Letters of a word that a table keeps in one line. Longer ones are broken where the page is narrow."""


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    recipe: Recipe | None = None,
    environment: Mapping[str, object],
) -> str:
    """Return one HTML page that needs no other file.

    ``tiles`` are the values at the top, each with its label. Everything is escaped except the bodies of ``sections``.
    The settings of a ``recipe`` are the last section.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ecanet.report")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")
    return template.render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=[*sections, *([("Recipe", "", show_settings(recipe))] if recipe else [])],
        environment=environment,
    )


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in HTML; on a narrow page each row becomes a block with the column's name before each value.

    >>> make_table(["Top-1"], [])  # names are not broken at hyphens
    '<table class=rows><tr><th>Top&#8209;1</th></tr></table>'
    >>> make_table(["gate", "mean"], [["a<b", 0.5]])[-78:]
    "<tr><td data-name='gate'>a&lt;b</td><td data-name='mean'>0.5</td></tr></table>"
    """
    names = [html.escape(column) for column in columns]
    head = "".join(f"<th>{name.replace('-', '&#8209;')}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td data-name='{name}'{_break(str(cell))}>{html.escape(str(cell))}</td>"
            for name, cell in zip(names, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    kind = "'rows many'" if len(names) > 7 else "rows"  # tables of many columns become blocks on wider pages already
    return f"<table class={kind}><tr>{head}</tr>{body}</table>"


def _break(text: str) -> str:
    """Return the class of a cell that may be broken within a word, for one with a longer word than a column is wide."""
    return " class=long" if max(map(len, text.split()), default=0) > LONGEST_WORD else ""
