"""Signals that end a run: all of them let it finish the present step and say how to go on."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

__all__ = ["find_scheduler", "stop_on_signals"]

OTHERS = ("SIGUSR1", "SIGHUP")
"""Beside SIGTERM: what schedulers send before a job's time is over, and a terminal that is closed. Windows has none."""


def find_scheduler() -> list[SLURMEnvironment]:
    """Return Lightning's plugin for SLURM where SLURM starts the processes, else nothing.

    It does not requeue. Lightning would write a checkpoint into the current folder at SIGUSR1, and every new run that
    begins there would go on from it. Give the same command with ``--auto-resume`` to the scheduler instead.
    """
    started = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if started else []


@contextmanager
def stop_on_signals() -> Generator[list[str]]:
    """Treat the signals `OTHERS` as SIGTERM in this context. Yield a list that gets the name of the one that came."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        os.kill(os.getpid(), signal.SIGTERM)

    numbers = [getattr(signal, name) for name in OTHERS if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
