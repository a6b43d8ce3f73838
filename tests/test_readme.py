"""The README's snippets run and its figures are right; both languages show the same code, figures and map."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

import ecanet
from published_networks import authors_file, randomize

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
BOTH = pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def count(model):
    return sum(p.numel() for p in model.parameters())


@BOTH
def test_the_first_snippet_attaches_losslessly(path):
    names = {}
    exec(snippets(path)[0], names)
    gates = [m for m in names["model"].modules() if isinstance(m, names["ecanet"].ECA)]
    assert (len(gates), sum(count(gate) for gate in gates)) == (16, 86)
    with torch.no_grad():
        gates[-1].conv.weight.fill_(
            1
        )  # the snippet's own assertion can fail: a gate that is not neutral changes outputs
    assert not torch.equal(names["model"](names["x"]), names["before"])


def test_the_second_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    authors_file(tmp_path / "eca_resnet50_k3557.pth.tar", "resnet50")
    weights = torchvision.models.ResNet50_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(randomize(torchvision.models.resnet50()).state_dict(), tmp_path / "hub" / "checkpoints" / weights)
    names = {}
    exec(snippets(README)[0].split("model =")[0] + snippets(README)[1], names)
    assert names["gate"].kernel_size == 5
    assert names["y"].shape == (8, 256, 14, 14)
    assert names["report"].complete
    assert count(names["released"]) == 25_557_032 + 80


def test_the_parameter_counts_are_the_networks():
    total, *added = re.findall(r"([\d,]+) \+ (\d+) parameters.*?\+ (\d+) parameters", README.read_text(), re.DOTALL)[0]
    total = int(total.replace(",", ""))
    sizes = ("adaptive", "official")
    assert [count(ecanet.create_model("resnet50", kernel_sizes=s)) - total for s in sizes] == [int(n) for n in added]
    # the Chinese README says the same in a sentence
    assert all(f"{number} " in CHINESE.read_text() for number in added)


def test_both_languages_show_the_same_code_and_figures():
    figures = r"\| (?:0|27|8,064) \|.*"
    english, chinese = ([re.sub(r" +#.*", "", code) for code in snippets(path)] for path in (README, CHINESE))
    assert english == chinese
    assert re.findall(figures, README.read_text().replace("**", "")) == re.findall(
        figures, CHINESE.read_text().replace("**", "")
    )


def test_both_languages_show_the_same_commands_and_links():
    def commands(path):
        lines = re.findall(r"^    ((?:ecanet|pip) .*)$", path.read_text(), re.MULTILINE)
        return [line.partition("#")[0].strip() for line in lines]

    def links(path):
        return set(re.findall(r"\]\(((?!README)[^)]+)\)", path.read_text()))

    def numbers(path):
        shown = re.sub(r"\]\([^)]*\)|`[^`]*`", "", path.read_text())
        return set(re.findall(r"\d+\.\d+", shown))

    assert commands(README) == commands(CHINESE)
    assert links(README) == links(CHINESE)
    assert numbers(README) == numbers(CHINESE)


def test_the_eight_tasks_begin_with_commands_that_exist():
    from ecanet.cli import COMMANDS

    for path in (README, CHINESE):
        rows = re.findall(r"^\| [^|*]+ \| (`ecanet[^|]*) \| \[docs/", path.read_text(), re.MULTILINE)
        assert len(rows) == 8
        for name in re.findall(r"`ecanet (\w+)", " ".join(rows)):
            assert name in COMMANDS


def test_both_languages_name_the_same_attention():
    row = re.search(r"\| \*\*Modules\*\* \| (.*?)\]\((.*?)\)", README.read_text())
    names = set(re.findall(r"\b\w*[A-Z]\w*\b|coordinate attention|non-local", row[1])) - {"Those"}
    assert {"ECA", "eSE", "EMA", "SimAM", "coordinate attention"} <= names
    assert {name for name in names if name not in CHINESE.read_text()} == set()
    assert f"]({row[2]})" in CHINESE.read_text()


def test_both_languages_have_the_same_map_of_the_rooms():
    maps = [re.findall(r"\]\((src/ecanet/[^)]+)\)", path.read_text()) for path in (README, CHINESE)]
    assert maps[0] == maps[1]
    rooms = {path.name for path in (ROOT / "src" / "ecanet").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {room for target in maps[0] if (room := target.split("/")[2]).isidentifier()}


@pytest.mark.parametrize("path", [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@BOTH
def test_the_commands_exist(path):
    typer = pytest.importorskip("typer")
    from ecanet.cli import app

    known = typer.main.get_command(app).commands
    named = set(re.findall(r"^    ecanet (\S+)", path.read_text(), re.MULTILINE))
    assert named <= set(known)
    assert set(known) <= named, "the README shows every command"


@BOTH
def test_each_command_finds_the_run_that_an_earlier_line_trains(path):
    made, used = set(), 0
    for line in re.findall(r"^    ecanet (.+)", path.read_text(), re.MULTILINE):
        words = line.partition("#")[0].split()
        runs = {word for word in words if word.startswith("runs/")}
        if words[0] == "train":
            made |= runs
        assert runs <= made, line
        used += len(runs)
    assert used > 8


@BOTH
def test_underscores_are_not_bold(path):
    """Outside of code and addresses, ``__main__`` is a bold "main"."""
    words = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", path.read_text(), flags=re.DOTALL)
    assert "__" not in words
