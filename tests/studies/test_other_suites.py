"""`python benchmarks/other_suites.py`: a tiny suite of the project's own, run over plain and attached networks."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "other_suites.py"

TIMM_SUITE = """
import pytest
import torch
from timm import create_model
from timm.models import register_model


@register_model
def linear(**options):
    return torch.nn.Linear(160, 160)


names = pytest.mark.parametrize("model_name", ["test_resnet.r160_in1k", "test_resnet.other", "linear", "test_vit"])
image = torch.rand(1, 3, 160, 160)


@names
def test_runs(model_name):
    assert create_model(model_name.partition(".")[0]).eval()(image).isfinite().all()


@names
def test_has_no_gates(model_name):
    network = create_model(model_name.partition(".")[0])
    assert not any("eca" in name for name, _ in network.named_modules()), f"{model_name} has gates"


@names
def test_scripted(model_name):
    torch.jit.script(create_model(model_name.partition(".")[0]))


@names
def test_skips(model_name):
    pytest.skip("always")


@names
def test_fails(model_name):
    raise ValueError("always")


@names
def test_model_load_pretrained(model_name):
    raise AssertionError("it would download")
"""

TORCHVISION_SUITE = """
import os

import pytest
import torch
from torchvision import models

builders = [models.get_model_builder(name) for name in ("resnet18", "squeezenet1_1", "vgg11")]


def _get_expected_file(name):
    raise FileNotFoundError("outputs of another version of PyTorch")


def _check_jit_scriptable(network):
    torch.jit.script(network)


@pytest.mark.parametrize("model_fn", [*builders, models.resnet18], ids=lambda build: build.__name__)
@torch.no_grad()
def test_same_outputs(model_fn):
    torch.manual_seed(0)
    network, file = model_fn().eval(), _get_expected_file(model_fn.__name__)
    output = network(torch.rand(1, 3, 64, 64))
    if os.getenv("EXPECTTEST_ACCEPT") == "1":
        torch.save(output, file)
    assert torch.equal(torch.load(file), output)
    _check_jit_scriptable(network)


def test_feature_extraction_methods_equivalence():
    assert any("eca" in name for name, _ in models.resnet18().named_modules())


@pytest.mark.parametrize("model_name", ["squeezenet1_1"])
def test_gates(model_name):
    assert any("eca" in name for name, _ in models.get_model(model_name).named_modules())
    assert any("eca" in name for name, _ in models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None).named_modules())
"""


@pytest.fixture
def script(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location("other_suites", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(module, "TIMM", ["test_resnet", "linear"])
    monkeypatch.setattr(module, "LARGEST", 12e6)
    return module


def write(folder: Path, suite: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "test_models.py").write_text(suite)
    return folder.parent


@pytest.mark.slow
def test_both_columns_and_the_causes(script, tmp_path, capsys):
    checkout = write(tmp_path / "timm" / "tests", TIMM_SUITE)
    (checkout / "timm.py").write_text("raise ImportError('the checkout was imported')")
    (checkout / "tests" / "__init__.py").touch()  # so that pytest puts the checkout on the path
    assert script.main(["--timm", str(checkout)]) == 1
    found = json.loads((tmp_path / "results.json").read_text())["suites"]["timm"]
    assert found["networks"] == 2
    both = {name: {"passed": 2} for name in ("test_runs", "test_has_no_gates", "test_scripted")}
    plain = both | {"test_skips": {"skipped": 2}, "test_fails": {"failed": 2}}
    assert {kind: counts["plain"] for kind, counts in found["kinds"].items()} == plain
    assert found["kinds"]["test_runs"]["attached"] == {"passed": 1, "refused": 1}
    assert found["kinds"]["test_fails"]["attached"] == {"failed": 2}
    assert found["pass plain"] == 6
    assert found["of these attached"] == {"passed": 1, "refused": 3, "failed": 1, "not scripted": 1}
    assert [(one["tests"], one["networks"]) for one in found["refused"]] == [(3, ["linear"])]
    causes = {one["cause"].partition(":")[0].partition(" cannot")[0]: one["tests"] for one in found["causes"]}
    assert causes == {"AssertionError": 1, "torch.jit.script": 1}
    assert found["plain causes"] == [{"cause": "ValueError: always", "tests": 2, "networks": ["linear", "test_resnet"]}]
    printed = capsys.readouterr().out
    assert "| test | plain: passed | plain: failed | plain: skipped | attached: passed |" in printed
    assert "| test_skips | 0 | 0 | 2 | 0 | 0 | 2 | 0 | 0 |" in printed


@pytest.mark.slow
def test_torchvisions_builders_are_wrapped_and_outputs_are_stored_first(script, tmp_path, capsys):
    checkout = write(tmp_path / "vision" / "test", TORCHVISION_SUITE)
    (checkout / "version.txt").write_text("0.21.0a0\n")
    (tmp_path / "results.json").write_text('{"suites": {"timm": {"version": "1.0"}}}')
    assert script.main(["--torchvision", str(checkout)]) == 0
    assert not (checkout / "test" / "expect").exists()
    printed = capsys.readouterr().out
    assert "| test_same_outputs | 3 | 0 | 0 | 3 |" in printed  # vgg11 is too large
    suites = json.loads((tmp_path / "results.json").read_text())["suites"]
    assert suites["timm"] == {"version": "1.0"}
    found = suites["torchvision"]
    assert found["sources"] == "version 0.21.0a0"
    for kind in ("test_gates", "test_feature_extraction_methods_equivalence"):
        assert found["kinds"][kind] == {"plain": {"failed": 1}, "attached": {"passed": 1}}
    unscripted = found["without its check of TorchScript"]
    assert unscripted["kinds"] == {"test_same_outputs": {"plain": {"passed": 3}, "attached": {"passed": 3}}}
    assert "torchvision without its check of TorchScript: 2 networks, 3 tests pass plain" in printed


def test_a_part_of_the_tests_is_no_result(script, monkeypatch, tmp_path, capsys):
    row = {"test": "t", "kind": "test_runs", "network": "n", "outcome": "passed", "cause": ""}
    asked = []
    monkeypatch.setattr(script, "run", lambda *a: asked.append(a) or {"plain": [row], "attached": [row]})
    checkout = write(tmp_path / "timm" / "tests", "")
    assert script.main(["--timm", str(checkout), "--only", "*runs*"]) == 0
    assert asked == [("timm", checkout, "*runs*")]
    assert "| test_runs | 1 | 1 |" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_mistakes_are_one_line(script, tmp_path, capsys):
    for arguments, line in (
        ([], "give the sources of at least one suite: --timm FOLDER or --torchvision FOLDER"),
        (["--timm", str(tmp_path)], "has no tests/test_models.py; give a checkout of its repository"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(arguments)
        assert capsys.readouterr().err.splitlines()[-1].endswith(line)
