"""The layout that all of the package's HTML pages share."""

from collections.abc import Mapping, Sequence

from ecanet.recipes import Recipe
from ecanet.report.settings import show_settings

__all__ = ["Section", "page"]

Section = tuple[str, str, str]
"""A heading, a note below it, and a body in HTML."""


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    recipe: Recipe,
    environment: Mapping[str, object],
) -> str:
    """Return one HTML page that needs no other file.

    ``tiles`` are the values at the top, each with its label. Everything is escaped except the bodies of ``sections``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ecanet.report")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")
    return template.render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=[*sections, ("Recipe", "", show_settings(recipe))],
        environment=environment,
    )
