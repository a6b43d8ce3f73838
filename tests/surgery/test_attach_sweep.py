"""Attach to networks of other libraries: a sample always, everything under the marker ``sweep``."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import attach_sweep as sweep
import ecanet
import sweep_checks
from ecanet.errors import AttachError
from sweep_networks import LIBRARIES
from sweep_networks.unusual import Complex
from tensors import noise

SAMPLE = (
    ("torchvision", "mobilenet_v2"),
    ("torchvision", "regnet_x_400mf"),
    ("torchvision", "squeezenet1_1"),
    ("timm", "convnext_atto"),
    ("timm", "dla34"),
    ("timm", "nf_resnet26"),
    ("timm", "resnetv2_18"),
    ("timm", "swiftformer_xs"),
    *(("written", name) for name in LIBRARIES["written"]),
)

ROOT = Path(__file__).parents[2]

EVERYTHING = [(library, name) for library, networks in LIBRARIES.items() for name in networks]


def run(library, name):
    if library != "written":
        pytest.importorskip(library)
    row = sweep.run_case(library, name)
    assert row["result"] in ("pass", "refused"), row["cause"]


LARGE = {
    "convnext_atto",
    "regnet_x_400mf",
    "dla34",
    "nf_resnet26",
    "swiftformer_xs",
    "resnetv2_18",
    "mobilenet_v2",
}  # two seconds each


@pytest.mark.parametrize(
    ("library", "name"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] in LARGE)) for case in SAMPLE]
)
def test_a_sample_of_networks_keeps_every_promise(library, name):
    run(library, name)


@pytest.mark.sweep
@pytest.mark.parametrize(("library", "name"), [case for case in EVERYTHING if case not in SAMPLE])
def test_all_networks_keep_every_promise(library, name):
    run(library, name)


def read_recipe():
    """Return the commands of `make sweep`."""
    recipe = (ROOT / "Makefile").read_text().partition("\nsweep:")[2].partition("\n\n")[0]
    return [line.strip() for line in recipe.splitlines()[1:]]


def test_make_sweep_installs_every_library():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    *installs, _ = read_recipe()
    assert any(line.endswith("'.[sweep]'") for line in installs)
    needed = [*project["dependencies"], *project["optional-dependencies"]["sweep"], *(i.split()[-1] for i in installs)]
    installed = {re.match(r"[\w-]*", name)[0].replace("-", "_") for name in needed}
    assert set(LIBRARIES) - {"written"} <= installed


@pytest.mark.slow
def test_make_sweep_runs_the_networks_that_are_left_out_by_default():
    command = shlex.split(read_recipe()[-1])
    assert command[:3] == ["$(BIN)/python", "-m", "pytest"]
    name = "tests/surgery/test_attach_sweep.py::test_all_networks_keep_every_promise[torchvision-shufflenet_v2_x0_5]"
    for options, end in (([], "1 deselected"), (command[3:], "1 passed")):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, name], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert end in run.stdout.splitlines()[-1], run.stdout


def test_a_wrong_gate_is_noticed(monkeypatch):
    # the checks can fail: a gate of 1.001 changes outputs
    monkeypatch.setattr(ecanet.ECA, "neutralize", lambda self: setattr(self, "gain", 2.002))
    row = sweep.run_case("written", "signals")
    assert row["result"] == "refused"
    assert "the outputs of Sequential would change" in row["cause"]
    monkeypatch.setattr(ecanet.surgery.proof.Insertion, "prove", lambda self: None)
    row = sweep.run_case("written", "signals")
    assert row["result"] == "fail"
    assert "outputs differ" in row["cause"]


@pytest.mark.parametrize(
    ("line", "change", "cause"),
    [
        ("no\nplace", None, "a refusal of 2 lines"),
        ("no place", "bias", "tensors after a refusal"),
        ("no place", "child", "keys after a refusal"),
    ],
)
def test_a_refusal_must_be_one_line_and_leave_the_network_as_it_was(monkeypatch, line, change, cause):
    def refuse(model, **options):
        if change == "bias":
            nn.init.ones_(model[0].bias)
        elif change == "child":
            model.add_module("left", nn.Linear(1, 1))
        raise AttachError(line)

    monkeypatch.setattr(ecanet, "attach", refuse)
    row = sweep.run_case("written", "signals")
    assert (row["result"], row["cause"]) == ("fail", cause)


def test_complex_outputs_are_compared():
    x = torch.complex(noise(2, 3), noise(2, 3))
    assert sweep_checks.equal(x, x.clone())
    assert not sweep_checks.equal(x, x.conj().resolve_conj())


def test_a_network_of_complex_numbers_is_refused_in_one_line():
    with pytest.raises(sweep_checks.RefusedError, match="complex"):
        sweep_checks.check(Complex(split=False), (noise(2, 3, 16, 16),))


def test_randomised_networks_hide_nothing():
    model, _ = LIBRARIES["written"]["signals"]()
    norm = model[1].branch[4]
    torch.nn.init.zeros_(norm.weight)
    sweep_checks.randomize(model)
    assert norm.weight.abs().min() > 0.1
    assert (norm.running_mean != 0).all()


def test_the_page_says_what_was_counted():
    rows = [
        {"library": "monai", "name": "a", "family": "f", "result": "pass"},
        {"library": "monai", "name": "b", "result": "refused", "cause": "x | y"},
        {"library": "written", "name": "c", "result": "fail", "cause": "outputs differ"},
    ]
    page = sweep.make_table({"rows": rows, "command": "c", "machine": "m"})
    assert "In all 1 of 3 pass, 1 refused, 1 fail." in page
    assert "## monai: 1 of 2 pass, 1 refused, 1 families" in page
    assert r"| b |  |  |  |  |  | refused: x \| y |" in page
