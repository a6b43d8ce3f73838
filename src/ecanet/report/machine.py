"""Describe the machine and the software of a run."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata

import torch

__all__ = ["Environment", "environment"]

Environment = dict[str, str | int | None]


def environment() -> Environment:
    """Return the versions, the machine and the time of a run; a package that is not installed has None."""
    cuda = torch.cuda.is_available()
    versions = {name: _find_version(name) for name in ("ecanet", "torch", "torchvision", "timm", "lightning")}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
