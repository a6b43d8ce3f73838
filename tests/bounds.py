"""Hold a call to bounds of time and memory."""

import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


def read_memory(name: str) -> int:
    """Return a figure of this process in bytes: VmRSS (memory now) or VmHWM (the most so far)."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0


@contextmanager
def bounded(seconds: float, memory: int) -> Generator[None]:
    """Fail if this context takes more time, or more memory beyond what the process has at its beginning.

    Only Linux says how much memory that is. Time is the process's own, so that other programs do not matter.
    """
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the most so far is what there is now
    begin, before = time.process_time(), read_memory("VmRSS") if reset.exists() else 0
    yield
    took = time.process_time() - begin
    assert took < seconds, f"took {took:.1f} s"
    if reset.exists():
        more = read_memory("VmHWM") - before
        assert more < memory, f"took {more / 1e6:.0f} MB"
