"""A device has one name everywhere, and a device that is not there is refused in one line."""

import pytest
import torch

from ecanet.errors import ConfigError
from ecanet.networks import find_device


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a number of CUDA GPUs, with or without Apple's GPU."""

    def pretend(gpus: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (2, True, "cuda")]
)
def test_auto_is_the_fastest_kind_of_device(machine, gpus, mps, expected):
    machine(gpus, mps)
    assert find_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps", torch.device("cuda:1")])
def test_a_device_of_this_machine_is_found(machine, name):
    machine(gpus=2, mps=True)
    assert find_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "tpu", "", "CPU", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "cpu:0", "meta"])
def test_an_unknown_name_is_refused(machine, name):
    machine(gpus=1)
    with pytest.raises(ConfigError) as caught:
        find_device(name)
    assert str(caught.value) == (
        f"unknown device {name!r}; write auto, cpu, cuda, cuda:N or mps (this machine has cpu, cuda, cuda:0)"
    )


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:9", 2), ("mps", 2)])
def test_a_device_that_is_not_there_is_refused(machine, name, gpus):
    machine(gpus)
    present = "cpu, cuda, cuda:0, cuda:1" if gpus else "cpu"
    with pytest.raises(ConfigError) as caught:
        find_device(name)
    assert str(caught.value) == f"no device {name!r} on this machine; choose one of auto, {present}"
