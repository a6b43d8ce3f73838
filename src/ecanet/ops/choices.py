"""Choose between PyTorch's operations and another form of the same, by a trial on the device.

A form may be right and slow, or may not run for some sizes. So it is tried once for each kind of work: its results are
checked, and then both forms are timed. What was chosen is recorded for later processes (`proof_records`), which thus
compute the same.
"""

import threading
import time
from collections.abc import Callable, Hashable

import torch

from ecanet.errors import summarize
from ecanet.ops import proof, proof_records

__all__ = ["compare_forms", "is_chosen", "list_choices", "reject"]

FASTER = "faster"
"""What is recorded of a form that is right and faster than PyTorch's operations; else the reason against it."""

ROUNDS, CALLS = 5, 5
"""Rounds in which the two forms take turns, and the calls between two readings of the clock."""

Form = Callable[[], object]
Key = tuple[torch.device, torch.dtype, Hashable]

_choices: dict[Key, str] = {}
_lock = threading.RLock()


def is_chosen(device: torch.device, dtype: torch.dtype, kind: Hashable, trial: Callable[[], str]) -> bool:
    """Return whether the other form shall run for this kind of work. The first call makes the ``trial``.

    ``kind`` is a tuple of plain values, all that speed and result depend on besides device and dtype. ``trial`` returns
    `FASTER` or the reason against the form (see `compare_forms`); an error is one.
    """
    key = device, dtype, kind
    if key not in _choices:
        with _lock:
            if key not in _choices:  # another thread may have tried while this one waited
                if proof.is_capturing(device):  # to read a clock would end the capture with an error
                    return False
                _choices[key] = proof_records.read_choice(device, dtype, str(kind)) or _try_form(key, trial)
    return _choices[key] == FASTER


def _try_form(key: Key, trial: Callable[[], str]) -> str:
    device, dtype, kind = key
    try:
        with proof.isolate(device), torch.no_grad():
            choice = trial()
    except torch.OutOfMemoryError:
        return "there was no memory to compare the two forms"  # there may be in the next process
    except Exception as error:  # cuDNN, Triton's compiler and the driver have exceptions of their own
        choice = f"it does not run: {summarize(error)}"
    proof_records.record_choice(device, dtype, str(kind), choice)
    return choice


def reject(device: torch.device, dtype: torch.dtype, kind: Hashable, reason: str) -> None:
    """Choose PyTorch's operations for this kind of work from now on, in this process."""
    _choices[(device, dtype, kind)] = reason


def list_choices() -> dict[str, str]:
    """Return what was chosen in this process for each kind of work."""
    return {f"{kind} in {dtype} on {device}": choice for (device, dtype, kind), choice in _choices.items()}


def compare_forms(device: torch.device, form: Form, plain: Form) -> str:
    """Return `FASTER` if ``form`` takes less time than ``plain``, else how long they take.

    The shortest times are compared, of rounds in which the two take turns.
    """
    times: dict[Form, float] = {}
    for turn in range(ROUNDS + 1):
        for one in (form, plain):
            took = _measure(device, one)
            if turn:  # the first round compiles, and lets cuDNN choose its algorithms
                times[one] = min(took, times.get(one, took))
    if times[form] < times[plain]:
        return FASTER
    return f"it takes {times[form]:.3g} ms, PyTorch's operations take {times[plain]:.3g} ms"


def _measure(device: torch.device, form: Form) -> float:
    """Return the milliseconds of one call of ``form``."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(CALLS):
            form()
        return (time.perf_counter() - started) * 1e3 / CALLS
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        first.record()
        for _ in range(CALLS):
            form()
        last.record()
    last.synchronize()
    return first.elapsed_time(last) / CALLS
