"""Show a recipe's settings as HTML: first those that differ from the named recipe, then all that this task reads."""

import html
import json
from collections.abc import Mapping
from typing import cast

from ecanet.recipes import RECIPES, Recipe, to_dict

__all__ = ["find_differences", "show_settings"]


def show_settings(recipe: Recipe) -> str:
    """Return the settings of ``recipe`` that differ from the recipe of its name, and all others folded away."""
    differences = find_differences(recipe)
    rows = "".join(
        f"<tr><td class=long><code>{html.escape(name)}</code></td><td data-name='this run'>{_show(here)}</td>"
        f"<td data-name='recipe {html.escape(recipe.name)}'>{_show(there)}</td></tr>"
        for name, (here, there) in differences.items()
    )
    if recipe.name not in RECIPES:
        changed = ""
    elif rows:
        head = f"<tr><th>setting</th><th>this run</th><th>recipe {html.escape(recipe.name)}</th></tr>"
        changed = f"<table class=rows>{head}{rows}</table>"
    else:
        changed = f"<p>As in the recipe {html.escape(recipe.name)}.</p>"
    used = html.escape(json.dumps(select_used(recipe), indent=2))
    return f"{changed}<details><summary>All settings</summary><pre>{used}</pre></details>"


def find_differences(recipe: Recipe) -> dict[str, tuple[object, object]]:
    """Return the settings that differ from the recipe of the same name: its value here, and there, by dotted name.

    >>> from ecanet.recipes import find
    >>> find_differences(find("quickstart").but(epochs=20))
    {'epochs': (20, 12)}
    """
    if recipe.name not in RECIPES:
        return {}
    here, there = (_flatten(to_dict(one)) for one in (recipe, RECIPES[recipe.name]()))
    return {name: (here.get(name), there.get(name)) for name in here if here[name] != there.get(name)}


def select_used(recipe: Recipe) -> dict[str, object]:
    """Return the settings as a dictionary, without a detector's where none is trained, and without empty ones."""
    values = to_dict(recipe)
    if recipe.task != "detection":
        del values["detector"]
    return cast(dict[str, object], _drop_empty(values))


def _drop_empty(value: object) -> object:
    if not isinstance(value, dict):
        return value
    inner = cast(Mapping[str, object], value)
    return {key: _drop_empty(one) for key, one in inner.items() if one not in (None, {}, [])}


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted names; a network's ``options`` are one setting."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "options":
            found |= _flatten(cast(Mapping[str, object], value), f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _show(value: object) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return f"<code>{html.escape(shown)}</code>"
