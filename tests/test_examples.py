"""The examples run, are short, and end with a network that was saved and loaded again."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_trains_and_loads_what_it_saved(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises more workers
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"loaded again: outputs equal, (\d+)% correct", out), out
    assert int(re.search(r"(\d+)% correct", out)[1]) >= 80
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}" in text
    assert "ecanet.parameter_groups" in text


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/attach.md", "examples/README.md"])
def test_the_pages_link_to_the_examples(page):
    path = EXAMPLES.parent / page
    links = {(path.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", path.read_text())}
    assert set(PROGRAMS) <= links
