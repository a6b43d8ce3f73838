"""Signals that end a run: it finishes the present step, writes a checkpoint, and says how to go on."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["StopRequest", "find_scheduler", "stop_on_signals", "take_over_signals"]

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")
"""What schedulers send before a job's time is over, and a terminal that is closed. Windows has the first alone."""


class StopRequest:
    """The signal that asks a run to end.

    Attributes:
        name: the signal that came first, or None.
        training: whether the run is between two steps or in one, so that it ends itself when the step is done.
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.training = False
        self.interrupted = False
        self.process = os.getpid()

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note the signal; before the first step and after the last one, end the run at once."""
        first = self.name is None
        self.name = self.name or signal.Signals(number).name
        if os.getpid() != self.process:
            # A worker that reads images: a scheduler sends the signal to all processes, and the run needs this one for
            # its last step. For SIGTERM, with which PyTorch and Python end a worker, see ecanet.data.module.
            if not first:
                os._exit(128 + number)
        elif not self.training:
            raise SIGTERMException

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Note Ctrl-C and end the run at once.

        Python drops an exception that is raised while it frees an object, a KeyboardInterrupt too. The next step raises
        it again.
        """
        self.interrupted = True
        signal.default_int_handler(number, frame)


def find_scheduler() -> list[SLURMEnvironment]:
    """Return Lightning's plugin for SLURM where SLURM starts the processes, else nothing.

    It does not requeue. Lightning would write a checkpoint into the current folder at SIGUSR1, and every new run that
    begins there would go on from it. Give the same command with ``--auto-resume`` to the scheduler instead.
    """
    started = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if started else []


def take_over_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals: `stop_on_signals` does.

    Lightning's handler for SIGTERM would send a message to the other processes from wherever this one is, perhaps in
    the middle of another message, so that all of them wait for ever. And at each step it asks the first process whether
    a signal came, for which a GPU must wait.
    """
    private = cast(Any, trainer)
    private._signal_connector.register_signal_handlers = lambda: None
    private.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


@contextmanager
def stop_on_signals(request: StopRequest) -> Generator[None]:
    """Give the signals `SIGNALS`, and Ctrl-C unless it is ignored, to ``request`` in this context."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, request.receive) for number in numbers}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background process ignores it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, request.interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
