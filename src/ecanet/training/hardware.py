"""Which devices of a kind train, and what a kind of device cannot do."""

import os

import torch

from ecanet.errors import ConfigError
from ecanet.recipes import Recipe

__all__ = ["check", "choose_devices"]


def choose_devices(device: torch.device, devices: int | str) -> int | str | list[int]:
    """Return Lightning's ``devices``: how many devices of the kind of ``device`` train, or the number of the one GPU.

    Raises:
        ConfigError: ``device`` is one GPU, and several devices are to train.
    """
    if devices == "auto" and "LOCAL_WORLD_SIZE" in os.environ:
        # torchrun started one process per device; Lightning's "auto" would mean a single device on a CPU.
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
    if device == torch.device(device.type):  # no number
        return devices
    if devices not in ("auto", 1):
        raise ConfigError(f"device {str(device)!r} is one GPU, but devices={devices!r}; use device='cuda' for several")
    return [device.index]


def check(recipe: Recipe, device: torch.device, processes: int) -> None:
    """Raise ConfigError if ``recipe`` has a setting that does not fit ``device``, or this number of processes."""
    if device.type == "cpu":
        _check_cpu(recipe, processes)
    if recipe.cuda_graph:
        _check_graph(device, processes)


def _check_cpu(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError if ``recipe`` has a setting that needs a GPU."""
    if recipe.precision == "16-mixed":
        # Lightning would compute in bfloat16 instead, with no more than a warning.
        raise ConfigError("precision 16-mixed needs a GPU; on a CPU set precision=bf16-mixed or precision=32")
    if recipe.sync_batchnorm and processes > 1:
        raise ConfigError("sync_batchnorm needs GPUs: PyTorch has it for no other device; leave it out")


def _check_graph(device: torch.device, processes: int) -> None:
    """Raise ConfigError if a run on ``device`` cannot take CUDA graphs."""
    if device.type != "cuda":
        raise ConfigError(f"cuda_graph needs a CUDA GPU, and this run trains on {device.type}; leave it out")
    if processes > 1:
        raise ConfigError(f"cuda_graph is for one GPU, and this run has {processes} processes; leave it out")
