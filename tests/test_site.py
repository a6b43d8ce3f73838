"""The documentation site has every page, public name and command; `make docs` builds it and checks its links."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

import ecanet
from ecanet.cli import TASKS

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site") / "docs"
    load("stage").main(target)
    return target


def list_pages(entries):
    for entry in entries:
        for inner in entry.values():
            yield from [inner] if isinstance(inner, str) else list_pages(inner)


def test_the_navigation_has_every_page(site):
    nav = list(list_pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    pages = {str(page.relative_to(site)) for page in site.rglob("*.md")}
    assert len(nav) == len(set(nav))
    assert set(nav) == {page for page in pages if not page.startswith("files/")}


def test_links_lead_somewhere(site):
    links = 0
    for page in site.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                links += 1
                assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert links > 50


def test_links_are_called_like_their_pages(site):
    for page in site.glob("*.md"):
        assert re.findall(r"\[[\w.-]+\.md\]\((?!files/)", page.read_text()) == []


def test_the_page_of_measurements_has_every_file_of_results():
    page = (ROOT / "docs" / "measured.md").read_text()
    files = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert files
    assert [name for name in files if f"(../benchmarks/results/{name})" not in page] == []


def test_the_reference_has_every_public_name(site):
    text = "".join(page.read_text() for page in (site / "reference").glob("*.md"))
    named = re.findall(r"^::: ecanet\.(\S+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(ecanet.__all__) <= set(named)
    for name in set(named) - set(ecanet.__all__):
        room, _, inside = name.partition(".")
        assert hasattr(importlib.import_module(f"ecanet.{room}"), inside), name


def test_the_commands_page_explains_every_option(site):
    text = (site / "reference" / "commands.md").read_text()
    headings = re.findall(r"^## ecanet (.+)$", text, re.MULTILINE)
    assert {"train", "export", "shards pack"} <= set(headings)
    assert not re.search(r"^\| `[^`]*` \|\s*\|$", text, re.MULTILINE), "an option without its meaning"


def test_both_start_pages_show_the_eight_tasks_of_the_command_line():
    for name in ("index.md", "index.zh-CN.md"):
        shown = re.findall(r"^\| [^|]+ \| `(ecanet [^`]+)` \|", (ROOT / "docs" / name).read_text(), re.MULTILINE)
        assert shown == list(TASKS.values())


def test_both_start_pages_have_one_program():
    english, chinese = (
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
        for name in ("index.md", "index.zh-CN.md")
    )
    assert len(english) == 1
    assert [re.sub(r" +#.*", "", code) for code in english] == [re.sub(r" +#.*", "", code) for code in chinese]


def test_the_pictures_are_what_their_script_draws():
    draw = load("draw")
    for name, picture in draw.PICTURES.items():
        assert (ROOT / "docs" / name).read_text() == picture(), f"python docs/draw.py would change docs/{name}"


def test_the_published_ablations_can_be_drawn(monkeypatch, tmp_path):
    script = load("draw_ablations")
    for name in script.RECIPES:
        assert (ROOT / "docs" / f"{name}.png").exists()
        rows = json.loads((script.RESULTS / f"{name}.json").read_text())["rows"]
        ablation = script.read_ablation(name)
        assert [one.variant.name for one in ablation.results] == [row["variant"] for row in rows]
        assert script.draw(ablation).axes
    published = {"rows": rows, "seeds": ablation.seeds}
    rows[-1]["significant"] = not rows[-1]["significant"]
    (tmp_path / f"{name}.json").write_text(json.dumps(published))
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=f"{rows[-1]['variant']} is not what the file says"):
        script.read_ablation(name)
