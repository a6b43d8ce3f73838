"""Every planted bug can be planted: its text stands once in its file, and its test exists."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [
    (listing.stem, mutant)
    for listing in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    for mutant in tomllib.loads(listing.read_text()).get("mutant", [])
]


@pytest.mark.parametrize(("topic", "mutant"), MUTANTS, ids=[f"{topic}: {m['name']}" for topic, m in MUTANTS])
def test_a_planted_bug_finds_its_place(topic, mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["find"]) == 1
    path, _, node = mutant["test"].partition("::")
    assert (ROOT / path).exists(), path
    if node:
        assert f"def {node.partition('[')[0].rpartition('::')[2]}(" in (ROOT / path).read_text()
