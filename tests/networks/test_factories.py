"""A network from a user's own file runs only if the user has named that file."""

import pytest
import torch

from ecanet import networks
from ecanet.errors import ConfigError
from ecanet.networks import build
from ecanet.recipes import ModelConfig

SOURCE = """
from torch import nn

def make(num_classes=7):
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, num_classes))

def fixed():
    return make()

def broken():
    raise RuntimeError("no such layer")

number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_file_that_nobody_named_does_not_run(file):
    file.write_text(f"import pathlib; pathlib.Path({str(file.with_suffix('.trace'))!r}).touch()\n" + SOURCE)
    with pytest.raises(ConfigError, match="nobody has named .* --model"):
        networks.find(f"{file}:make")
    assert not file.with_suffix(".trace").exists()
    networks.trust(f"{file}:make")
    networks.find(f"{file}:make")
    assert file.with_suffix(".trace").exists()


def test_a_file_that_changed_must_be_named_again(file):
    networks.trust(f"{file}:make")
    networks.find(f"{file}:make")
    file.write_text(SOURCE + "\nchanged = True\n")
    with pytest.raises(ConfigError, match="nobody has named"):
        networks.find(f"{file}:make")
    networks.trust(f"{file}:make")
    networks.find(f"{file}:make")


@pytest.mark.parametrize("function", ["make", "fixed"])
def test_the_head_fits_the_classes(file, function):
    name = networks.trust(f"{file}:{function}")
    built = build(ModelConfig(name=name, attention="none"), num_classes=4, image=(3, 16, 16))
    assert built.model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert built.head == "4"


def test_the_name_becomes_absolute(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert networks.trust("mine.py:make") == f"{file}:make"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "fails: RuntimeError: no such layer"),
        ("number", "has no function 'number'"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_what_is_no_network_is_one_line(file, function, message):
    networks.trust(f"{file}:{function}")
    with pytest.raises(ConfigError, match=message) as caught:
        networks.find(f"{file}:{function}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_file_with_an_error_are_one_line(file):
    with pytest.raises(ConfigError, match="cannot be read"):
        networks.trust(f"{file.with_name('other.py')}:make")
    file.write_text("import no_such_package\n")
    networks.trust(f"{file}:make")
    with pytest.raises(ConfigError, match="fails when it runs: ModuleNotFoundError"):
        networks.find(f"{file}:make")
