"""Time, memory and bytes of steps, measured so that what slows the machine slows all variants alike.

Variants take turns within one run (A B C, B C A, C A B, ...). A ratio is made round by round, of two times of the same
round; what is given is the median over the rounds, with the quartiles as its spread.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ecanet.ops import lean, list_implementations
from ecanet.studies.bench import traffic

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

COPIED = 2**26
"""Elements of the tensor that is copied to measure the memory's bandwidth: 256 MB, more than caches hold."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """As many rounds as fit into ``seconds``, but from ``least`` to ``most``; one more, not counted, warms up."""

    seconds: float
    least: int = 5
    most: int = 100


def interleaved(steps: Mapping[Name, Step], budget: Budget, *, device: str, title: str) -> dict[Name, list[float]]:
    """Seconds of each step in each round; the order turns by one from round to round."""
    names = list(steps)
    times: dict[Name, list[float]] = {name: [] for name in names}
    with _bar(title, len(names)) as moved:
        started, rounds = 0.0, -1  # the first round warms up
        while rounds < budget.least or (rounds < budget.most and _another(clock(device) - started, rounds, budget)):
            for shift in range(len(names)):
                name = names[(rounds + shift) % len(names)]
                begun = clock(device)
                steps[name]()
                seconds = clock(device) - begun
                if rounds >= 0:
                    times[name].append(seconds)
                moved(_expected(times, budget))
            rounds += 1
            if rounds == 0:
                started = clock(device)
    return times


def _another(spent: float, rounds: int, budget: Budget) -> bool:
    return spent * (rounds + 1) / rounds <= budget.seconds


def _expected(times: Mapping[Any, list[float]], budget: Budget) -> int:
    """Rounds that fit, by the times so far, the one that warms up included."""
    each = [statistics.median(values) for values in times.values() if values]
    if not each:
        return 1 + budget.least
    fit = int(budget.seconds / max(1e-9, len(times) * statistics.mean(each)))
    return 1 + min(budget.most, max(budget.least, fit))


@contextmanager
def _bar(title: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar with the remaining time, on a terminal; gives what moves it by a step, told the expected rounds."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda rounds: bar.update(task, advance=1, total=rounds * steps)


def clock(device: str) -> float:
    """Now, after all that the device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 9.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    found = list(values)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": middle, "low": low, "high": high}


def ratio(first: Iterable[float], second: Iterable[float]) -> dict[str, float]:
    """Median and quartiles of ``first / second``, round by round: below 1 the first is faster.

    >>> ratio([2.0, 3.0, 40.0], [4.0, 4.0, 80.0])["median"]
    0.5
    """
    return spread(x / y for x, y in zip(first, second, strict=True))


def copy(device: str) -> tuple[Step, int]:
    """A copy of a large tensor, and the bytes that it moves."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def memory(step: Step, device: str) -> float:
    """MB that ``step`` needs beside what is there: CUDA's peak, or on a CPU what autograd keeps for the backward."""
    if device != "cuda":
        return traffic.saved(step) / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def moved(step: Step, smallest: int = 4096) -> float:
    """MB that ``step`` reads and writes, by count: each operation's tensors once, convolutions left out.

    On a CPU the lean passes count as one operation each: their groups of samples stay in the cache. So do the kernels'
    passes, which read and write each of their tensors once: `traffic.interpreted` counts that load by load.
    """
    with traffic.counted(smallest) as count, _whole_passes(count, smallest):
        step()
    return count.moved / 1e6


@contextmanager
def _whole_passes(count: traffic.Traffic, smallest: int) -> Iterator[None]:
    """Count each pass of the kernels and, on a CPU, of `lean` as one operation."""
    names = ("moments", "apply", "reduce", "grads")
    passes = {(kind, name): getattr(kind, name) for kind in list_implementations() for name in names}

    def counting(kind: Any, name: str) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            before = count.read, count.written
            out = passes[kind, name](*args)
            if kind is not lean or args[0].device.type == "cpu":
                read, written = large(_read(name, args), smallest), large(out, smallest)
                count.read = before[0] + sum(read.values())
                count.written = before[1] + sum(size for at, size in written.items() if at not in read)
            return out

        return counted

    for kind, name in passes:
        setattr(kind, name, counting(kind, name))
    try:
        yield
    finally:
        for (kind, name), function in passes.items():
            setattr(kind, name, function)


def _read(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the pass reads of its arguments: see `ecanet.ops.passes.Passes`."""
    if name == "moments" and args[1] == 0:
        return ()
    if name == "grads" and args[-1] is None and args[2].activation is None:
        return args[:1]
    return args


def large(tree: Any, smallest: int) -> dict[int, int]:
    """Address and bytes of each tensor of at least ``smallest`` elements, each once."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.numel() >= smallest]
    return {x.data_ptr(): x.nbytes for x in tensors}
