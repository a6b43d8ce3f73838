"""The notebooks run, offline and within two minutes each; what they print is not kept in the repository."""

import json
import re
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
QUICK = ("signals", "volumes")
"""These also run without a kernel, cell by cell, in the default tests."""


def read(path):
    return json.loads(path.read_text())


def list_sources(path, kind="code"):
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == kind]


def test_there_is_a_notebook_for_each_subject():
    assert {path.stem for path in NOTEBOOKS} == {
        "compare_gates", "fine_tune", "own_gate", "signals", "volumes", "yolo"
    }  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_its_outputs(path):
    content = read(path)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert path.stat().st_size < 15_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title_and_is_listed(path):
    text = "\n".join(list_sources(path, "markdown"))
    assert text.startswith("# ")
    assert f"]({path.name})" in (EXAMPLES / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / link).exists()


@pytest.mark.parametrize("name", QUICK)
def test_a_small_notebook_learns_what_it_says(name, capsys):
    names = {"__name__": "__main__"}
    for at, source in enumerate(list_sources(EXAMPLES / f"{name}.ipynb")):
        exec(compile(source, f"{name}.ipynb, code cell {at}", "exec"), names)
    assert names["accuracy"] >= 0.85
    assert "2 sites" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    # A download would fail: there is nobody at these addresses.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    started = time.monotonic()
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - started < 120
    out = "".join(one.get("text", "") for cell in book.cells for one in cell.get("outputs", []))
    if found := re.search(r"(\d+)% of \d+ ", out):
        assert int(found[1]) >= 80
    else:
        assert "gates have a gradient" in out or "paired difference to the plain network" in out
    assert list(tmp_path.iterdir()) == []
