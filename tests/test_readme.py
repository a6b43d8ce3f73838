"""What the README says runs as it stands, and the two languages show the same code and figures."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from published_networks import authors_file, randomize

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda p: p.name)
def test_the_first_snippet_attaches_losslessly(path):
    names = {}
    exec(snippets(path)[0], names)
    gates = [m for m in names["model"].modules() if isinstance(m, names["ecanet"].ECA)]
    assert (len(gates), sum(p.numel() for gate in gates for p in gate.parameters())) == (16, 86)
    with torch.no_grad():
        gates[-1].conv.weight.fill_(1)  # and the assertion in it can fail
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


def test_both_languages_show_the_same():
    figures = r"\| (?:0|27|8,064) \|.*"
    assert snippets(README)[0].count("\n") == snippets(CHINESE)[0].count("\n")
    assert re.findall(figures, README.read_text().replace("**", "")) == re.findall(
        figures, CHINESE.read_text().replace("**", "")
    )


@pytest.mark.parametrize("path", [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_commands_exist():
    typer = pytest.importorskip("typer")
    from ecanet.cli import app

    known = typer.main.get_command(app).commands
    named = set(re.findall(r"^    ecanet (\S+)", README.read_text(), re.MULTILINE))
    assert len(named) > 3
    assert named <= set(known)
