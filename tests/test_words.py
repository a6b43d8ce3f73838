"""Words: no private ones, docstrings that begin with a verb or a noun, and functions named by verbs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from source_files import PACKAGE, ROOMS, ROOT, docstrings, files_of, name, public_functions

PRIVATE = {
    r"\bluck\b": "random state",
    r"\btwins?\b": "copy, second output, counterpart: whichever it is",
    r"\b(told|tells?) (rightly|wrongly|right|wrong)\b": "correctly or wrongly classified",
    r"\bby commas\b": "comma-separated",
    r"\bbeyond[_ ]noise\b": "significant, with the name of the test",
    r"\bto none, paired\b": "paired difference to the plain network",
    r"\bgenuine\(": "a predicate: has_hooks, overrides_forward",
    r"\blistened\(": "a predicate: has_hooks",
    r"\bwatched\(": "a predicate: has_hooks",
    r"\bby lot\b": "at random",
    r"\bown way's\b": "one path's",
    r"\bDecides all\b": "Random seed",
    r"\bstranger'?s?\b": "user's or other library's network",
    r"\bput right\b": "corrected, or a suggestion",
    r"\bLook\b(?=[(.:\]])": "DataSpec",
}
"""Words that only this project's authors understood, and what to write instead."""

VAGUE = re.compile(r"(What|Whether|Those|That which)\b")
"""A docstring that begins so describes a thing without naming it."""

NOT_PARTICIPLES = {"attached", "bed", "embed", "exceed", "feed", "need", "proceed", "red", "seed", "shed", "speed"}
"""Names in "ed" that may begin a function's name; `ecanet.attached` is a promised public name."""

OVERRIDDEN = {"named_buffers", "named_children"}
"""Methods of PyTorch's classes that this library overrides."""

IRREGULAR = {
    "built",
    "chosen",
    "drawn",
    "given",
    "held",
    "kept",
    "known",
    "laid",
    "made",
    "said",
    "shown",
    "told",
    "written",
}


def private_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and a description of every private word in ``text``."""
    for pattern, better in PRIVATE.items():
        for match in re.finditer(pattern, text):
            yield text.count("\n", 0, match.start()) + 1, f"{match.group()!r}; say: {better}"


def test_the_search_finds_what_it_is_for():
    text = 'First line.\nRuns differ by luck, or the twin is told wrongly.\nif genuine(module): """Names, by commas."""'
    assert [line for line, _ in private_words(text)] == [2, 2, 2, 3, 3]
    text = "A copy, luckily, of the twine. It says what is wrong; commas separate. Looking at Lookup."
    assert not list(private_words(text))
    assert all(map(is_participle, ("widened", "parsed_sizes", "told")))
    assert not any(map(is_participle, ("attached", "seed_everything", "is_folded", "derive_seed", "speed_of", "red")))
    assert VAGUE.match("What a run is.")
    assert not VAGUE.match("Whatever the caller passes is checked.")


@pytest.mark.parametrize("room", ROOMS)
def test_no_private_words_in_the_package(room):
    paths = [*files_of(room), *(path for kind in ("html", "css") for path in (PACKAGE / room).rglob(f"*.{kind}"))]
    found = [f"{name(path, line)}: {word}" for path in paths for line, word in private_words(path.read_text())]
    assert not found, "\n".join(["private words:", *found])


def test_no_private_words_in_docs_and_tests():
    found: list[str] = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        if path.name != "CHANGELOG.md":  # it tells what was there before
            found += [f"{name(path, line)}: {word}" for line, word in private_words(path.read_text())]
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if path != Path(__file__):
            for start, text in docstrings(path):
                found += [f"{name(path, start + line - 1)}: {word}" for line, word in private_words(text)]
    assert not found, "\n".join(["private words:", *found])


def test_docstrings_name_their_subject():
    paths = [path for room in ROOMS for path in files_of(room)]
    all_of_them = [(name(path, line), text) for path in paths for line, text in docstrings(path)]
    vague = [f"{where}: {text.splitlines()[0]}" for where, text in all_of_them if VAGUE.match(text)]
    assert len(vague) <= 0.02 * len(all_of_them), "\n".join(['begin with "Return", "Raise" or a noun:', *vague])


def is_participle(function: str) -> bool:
    """Return whether a function's name begins with a participle."""
    first = function.split("_")[0]
    return first in IRREGULAR or (first.endswith("ed") and first not in NOT_PARTICIPLES)


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a property, which is named like an attribute."""
    return any(ast.unparse(decorator).endswith(("property", ".setter")) for decorator in function.decorator_list)


@pytest.mark.parametrize("room", ROOMS)
def test_functions_are_named_by_verbs(room):
    found = [
        f"{name(path, function.lineno)}: {function.name}"
        for path in files_of(room)
        for function in public_functions(path)
        if is_participle(function.name) and not is_property(function) and function.name not in OVERRIDDEN
    ]
    assert not found, "\n".join(["begin a function's name with a verb, or is_ and has_:", *found])
