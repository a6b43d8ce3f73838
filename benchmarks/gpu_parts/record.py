"""The JSON file of a run: written again after each part, so that no figure is lost."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from setting import Setting


class Record:
    """Runs parts within a time limit and saves their figures, failures and omissions."""

    def __init__(self, out: Path, seconds: float, machine: dict[str, object]) -> None:
        self.out, self.limit, self.started = out, seconds, time.monotonic()
        self.parts: dict[str, dict[str, object]] = {}
        self.content: dict[str, object] = {"format": 1, **machine, "missing": [], "parts": self.parts}
        self.save()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    def note(self, missing: Sequence[str]) -> None:
        """Say which packages are missing, one line each, and save it."""
        for line in missing:
            print(line, flush=True)
        self.content["missing"] = list(missing)

    def run(self, name: str, least: float, part: Callable[[], object]) -> None:
        """Run ``part`` unless fewer than ``least`` seconds are left; a failure is saved and the next part can run."""
        left = self.limit - self.elapsed
        if left < least or left <= 0:
            self.parts[name] = {"skipped": f"{max(0, left):.0f} s were left and it needs {least:.0f} s"}
        else:
            started = time.monotonic()
            self.parts[name] = attempt(part)
            self.parts[name]["seconds"] = round(time.monotonic() - started, 1)
        self.save()
        print(f"[{self.elapsed:4.0f} s] {name}: {json.dumps(self.parts[name])[:500]}", flush=True)

    def finish(self) -> int:
        """Save the total time and return the exit code: 1 if a part failed."""
        self.save()
        counts = [sum(state in part for part in self.parts.values()) for state in ("figures", "skipped", "failed")]
        done, skipped, failed = counts
        print(f"{done} parts done, {skipped} skipped, {failed} failed in {self.elapsed:.0f} s; figures in {self.out}")
        return 1 if failed else 0

    def save(self) -> None:
        """Replace the JSON file in one step: an interrupted run leaves the old file or the new one."""
        self.content["seconds"] = round(self.elapsed, 1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.out.with_name(self.out.name + ".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.out)


def attempt(part: Callable[[], object]) -> dict[str, object]:
    """Return the figures of ``part``, or its error and the end of its traceback."""
    try:
        return {"figures": part()}
    except Exception as error:  # of any library: the other parts must still run
        return {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def describe_machine(setting: Setting) -> dict[str, object]:
    """Return the command, the machine, the versions and the commit."""
    found: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "rehearsal": not setting.on_gpu,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": find_version("triton"),
        "cpus": os.cpu_count(),
        "device": platform.machine(),
    }
    if setting.on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        memory = round(gpu.total_memory / 1e9, 1)
        found |= {"device": gpu.name, "multiprocessors": gpu.multi_processor_count, "memory_gb": memory}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def find_version(package: str) -> str | None:
    """Return the installed version of ``package``, None if it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_commit() -> str | None:
    """Return the commit of this repository, with "-dirty" if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
