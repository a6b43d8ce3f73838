"""Describe where and with what a run of the benchmark was made."""

import platform
import subprocess
from pathlib import Path

import torch

from ecanet.report import environment


def describe_environment(device: str, model: str, image_size: int) -> dict[str, object]:
    """Return the machine, the versions, the commit and the settings of this run."""
    return {
        **environment(),
        "device": torch.cuda.get_device_name() if device == "cuda" else find_cpu_name(),
        "commit": find_commit(),
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "layout": "channels_last",
        "model": model,
        "image_size": image_size,
    }


def find_commit() -> str | None:
    """Return the commit of this source, with "-dirty" if files differ from it; None outside its own repository."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    tracked = git("ls-files", "--error-unmatch", here.name)  # false for a package installed inside another repository
    return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*") if tracked else None


def find_cpu_name() -> str:
    """Return the name of the processor, or its architecture if the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
