"""Every planted bug can be planted: its text stands once in its file, and its test exists."""

import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTINGS = sorted((ROOT / "tests" / "mutants").glob("*.toml"))


@functools.cache
def read(path):
    return path.read_text() if path.exists() else ""


def find_faults(mutant):
    """Return what hinders a bug from being planted, or its test from running."""
    if read(ROOT / mutant["file"]).count(mutant["find"]) != 1:
        return "its text does not stand once in its file"
    path, _, node = mutant["test"].partition("::")
    if not (ROOT / path).exists():
        return f"there is no {path}"
    if node and f"def {node.partition('[')[0].rpartition('::')[2]}(" not in read(ROOT / path):
        return f"there is no test {node}"
    return None


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.stem)
def test_planted_bugs_find_their_places(listing):
    mutants = tomllib.loads(listing.read_text()).get("mutant", [])
    faults = {mutant["name"]: find_faults(mutant) for mutant in mutants}
    assert {name: fault for name, fault in faults.items() if fault} == {}
