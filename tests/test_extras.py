"""The extras of pyproject.toml: exact versions for each, and one line that names the extra where it is missing."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

import ecanet
from ecanet import recipes
from ecanet.deploy.quantize import QUANTIZERS, quantize
from ecanet.errors import ConfigError, EcanetError
from ecanet.studies import ablate

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FOR_USERS = {*EXTRAS} - {"dev", "docs", "sweep"}
PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_has_an_exact_version_that_fits(extra):
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name != "ecanet":
            assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_messages_name_every_extra_and_no_other():
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    by_name = {"export", "openvino", "executorch", "mlflow", "wandb"}  # the code puts these names into the line
    assert {*re.findall(r"pip install 'ecanet\[([a-z]+)\]'", code)} | by_name == FOR_USERS


def test_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"^Ray is not installed: pip install 'ecanet\[cluster\]', or leave out --on ray$"
    ):
        ablate.run(recipes.find("quickstart"), folder=tmp_path, variants=["none"], seeds=1, on="ray", say=str)


@pytest.mark.parametrize("target", [name for name, quantizer in QUANTIZERS.items() if quantizer.packages])
def test_int8(tmp_path, monkeypatch, target):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    x, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match=rf"^[^\n]*{target} needs [a-z]+: pip install 'ecanet\[{target}\]'$"):
        quantize(nn.Conv2d(3, 3, 1), tmp_path / "net", target=target, calibration=x, held_out=(x, labels))
    assert target in FOR_USERS


@pytest.mark.parametrize("missing", ["safetensors.torch", "huggingface_hub"])
def test_the_hub(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    remedy = r"^[^\n]*; install it by pip install 'ecanet\[hub\]'$|^[^\n]*: install it by pip install 'ecanet\[hub\]'$"
    model = ecanet.create_model("resnet20", num_classes=2)
    if missing == "safetensors.torch":
        with pytest.raises(EcanetError, match=remedy):
            ecanet.save_pretrained(model, tmp_path / "net")
        return
    with pytest.raises(EcanetError, match=remedy):
        ecanet.from_pretrained("somebody/net")
    with pytest.raises(EcanetError, match=remedy):
        ecanet.push_to_hub(model, "somebody/net")
