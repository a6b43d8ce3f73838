"""The sizes the project keeps: files, functions, the median module, and how often a type is `Any`."""

import ast
import inspect
import re
import statistics
import typing
from collections.abc import Callable

import pytest

import ecanet
from source_files import PACKAGE, ROOMS, Function, exported_names, files_of, functions, name, tree

LONGEST_FILE = 350
LONGEST_FUNCTION = 60
MEDIAN_MODULE = (100, 200)
MOST_ANY = 10
"""`Any` for each 1,000 lines."""


@pytest.mark.parametrize("room", ROOMS)
def test_files_and_functions_are_short(room):
    found: list[str] = []
    for path in files_of(room):
        lines = len(path.read_text().splitlines())
        if lines > LONGEST_FILE:
            found.append(f"{name(path)} has {lines} lines, more than {LONGEST_FILE}")
        for function in functions(path):
            length = lines_of(function)
            if length > LONGEST_FUNCTION:
                found.append(
                    f"{name(path, function.lineno)}: {function.name} has {length} lines, more than {LONGEST_FUNCTION}"
                )
    assert not found, "\n".join(found)


def lines_of(function: Function) -> int:
    """Return a function's number of lines. Docstrings of exported functions do not count."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    documentation = ast.get_docstring(function, clean=False) or ""
    return lines - len(documentation.splitlines()) if function.name in exported_names() else lines


def test_a_typical_module_is_neither_a_scrap_nor_a_scroll():
    lengths = [len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert MEDIAN_MODULE[0] <= statistics.median(lengths) <= MEDIAN_MODULE[1]


def test_any_is_rare():
    counts = {name(path): count_any(tree(path)) for path in PACKAGE.rglob("*.py")}
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    most = sorted(counts.items(), key=lambda item: -item[1])[:12]
    share = 1000 * sum(counts.values()) / lines
    assert share <= MOST_ANY, f"{share:.1f} for each 1,000 lines; most in {most}"


def count_any(node: ast.AST) -> int:
    """Return how often ``node`` names `Any`, imports left aside."""
    names = (
        inner.id if isinstance(inner, ast.Name) else inner.attr if isinstance(inner, ast.Attribute) else ""
        for inner in ast.walk(node)
    )
    return sum(found == "Any" for found in names)


def signatures_of(public: str) -> list[str]:
    """Return the type hints of a public function, or of a class's public methods, as text with aliases resolved."""
    target = getattr(ecanet, public)
    members = [target]
    if inspect.isclass(target):
        methods = {key: member for key, member in vars(target).items() if inspect.isfunction(member)}
        members = [member for key, member in methods.items() if key == "__init__" or not key.startswith("_")]
    return [str(hint) for member in members for hint in hints_of(member).values()]


def hints_of(member: Callable[..., object]) -> dict[str, object]:
    """Return the type hints of a function, unresolved where one names a type imported for type checkers only."""
    try:
        return typing.get_type_hints(member)
    except NameError:
        return inspect.get_annotations(member)


PUBLIC = [public for public in ecanet.__all__ if callable(getattr(ecanet, public))]


@pytest.mark.parametrize("public", PUBLIC)
def test_public_signatures_say_their_types(public):
    loose = [text for text in signatures_of(public) if re.search(r"\bAny\b", text)]
    assert not loose, f"ecanet.{public} has {loose}"
