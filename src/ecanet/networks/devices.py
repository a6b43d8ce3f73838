"""Find a device by its name: one spelling for every function and every command."""

import re

import torch

from ecanet.errors import ConfigError

__all__ = ["find_device"]

NUMBERED_GPU = re.compile(r"cuda:(?:0|[1-9]\d*)")


def find_device(name: str | torch.device) -> torch.device:
    """Return the device called ``name``: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` is the fastest kind of device that this machine has: ``cuda``, else ``mps`` (Apple's GPU), else ``cpu``.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        ConfigError: ``name`` is not such a name, or this machine has no such device.
    """
    name = str(name)
    available = _available_devices()
    if name == "auto":
        kinds = [kind for kind in ("cuda", "mps", "cpu") if kind in available]
        return torch.device(kinds[0])
    if name not in ("cpu", "cuda", "mps") and not NUMBERED_GPU.fullmatch(name):
        raise ConfigError(
            f"unknown device {name!r}; write auto, cpu, cuda, cuda:N or mps (this machine has {', '.join(available)})"
        )
    if name not in available:
        raise ConfigError(f"no device {name!r} on this machine; choose one of auto, {', '.join(available)}")
    return torch.device(name)


def _available_devices() -> list[str]:
    """Return the names of this machine's devices, without ``auto``."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbered = [f"cuda:{index}" for index in range(gpus)]
    return ["cpu", *(["cuda"] if gpus else []), *numbered, *(["mps"] if torch.backends.mps.is_available() else [])]
