"""Measure time, memory and bytes of steps so that a slow phase of the machine slows all variants alike.

Variants take turns within one run (A B C, B C A, C A B, ...). A ratio divides two times of the same round. The result
is the median over the rounds, with the quartiles as its spread.
"""

import statistics
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ecanet import progress
from ecanet.ops import lean, list_implementations
from ecanet.studies.bench import traffic
from ecanet.studies.bench.rows import Spread

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

COPIED = 2**26
"""Elements of the tensor that is copied to measure memory bandwidth: 256 MB, more than caches hold."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """As many rounds as fit into ``seconds``, but from ``least`` to ``most``. One more round warms up, uncounted."""

    seconds: float
    least: int = 5
    most: int = 100


def interleave(steps: Mapping[Name, Step], budget: Budget, *, device: str, title: str) -> dict[Name, list[float]]:
    """Return the seconds of each step in each round; the order of the steps turns by one from round to round.

    Args:
        steps: Functions by name.
        budget: How many rounds run.
        device: "cpu" or "cuda".
        title: Text of the progress bar.
    """
    names = list(steps)
    times: dict[Name, list[float]] = {name: [] for name in names}
    with progress.show(title, len(names) * (1 + budget.least)) as advance:
        started, rounds = 0.0, -1  # the first round warms up
        while rounds < budget.least or (rounds < budget.most and _fits(clock(device) - started, rounds, budget)):
            for shift in range(len(names)):
                name = names[(rounds + shift) % len(names)]
                begun = clock(device)
                steps[name]()
                seconds = clock(device) - begun
                if rounds >= 0:
                    times[name].append(seconds)
                advance(1, len(names) * _estimate_rounds(times.values(), budget))
            rounds += 1
            if rounds == 0:
                started = clock(device)
    return times


def _fits(spent: float, rounds: int, budget: Budget) -> bool:
    """Return whether one more round fits, if it takes as long as the ``rounds`` so far did on average."""
    return spent * (rounds + 1) / rounds <= budget.seconds


def _estimate_rounds(times: Iterable[list[float]], budget: Budget) -> int:
    """Return how many rounds will run, judged by the times so far and including the round that warms up."""
    times = list(times)
    medians = [statistics.median(values) for values in times if values]
    if not medians:
        return 1 + budget.least
    fit = int(budget.seconds / max(1e-9, len(times) * statistics.mean(medians)))
    return 1 + min(budget.most, max(budget.least, fit))


def clock(device: str) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compute_spread(values: Iterable[float]) -> Spread:
    """Return the median and the quartiles.

    >>> compute_spread([1.0, 2.0, 3.0, 4.0, 9.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    found = list(values)
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": median, "low": low, "high": high}


def compute_ratio(first: Iterable[float], second: Iterable[float]) -> Spread:
    """Return the median and the quartiles of ``first / second``, round by round. Below 1 the first is faster.

    >>> compute_ratio([2.0, 3.0, 40.0], [4.0, 4.0, 80.0])["median"]
    0.5
    """
    return compute_spread(x / y for x, y in zip(first, second, strict=True))


def make_copy(device: str) -> tuple[Step, int]:
    """Return a function that copies a large tensor, and the bytes that it reads and writes."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def measure_memory(step: Step, device: str) -> float:
    """Return the MB that ``step`` needs in addition to what is allocated before it.

    On a GPU it is the peak of the allocator, on a CPU what autograd keeps for the backward.
    """
    if device != "cuda":
        return traffic.count_saved_bytes(step) / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def count_moved_mb(step: Step, smallest: int = 4096) -> float:
    """Return the MB that ``step`` reads and writes, by count: each operation's tensors once, without convolutions.

    On a CPU each of the lean passes counts as one operation, because its groups of samples stay in the cache. Each
    launch of a kernel does, too: it reads or writes each of its tensors once, and `traffic.count_interpreted_accesses`
    shows it. Tensors of fewer than ``smallest`` elements do not count.
    """
    with traffic.count_operations(smallest) as count, _count_whole_passes(count, smallest):
        step()
    return count.moved / 1e6


@contextmanager
def _count_whole_passes(count: traffic.Traffic, smallest: int) -> Generator[None]:
    """Count each pass of the kernels as one operation, and on a CPU each pass of `lean`."""
    names = ("moments", "apply", "reduce", "grads")
    passes = {name: cast(Callable[..., object], getattr(lean, name)) for name in names}

    def counting(name: str, run: Callable[..., object]) -> Callable[..., object]:
        def run_and_count(*args: object) -> object:
            before = count.read, count.written
            out = run(*args)
            if cast(Tensor, args[0]).device.type == "cpu":
                read = find_large_tensors(_select_read(name, args), smallest)
                written = find_large_tensors(out, smallest)
                # replaces what the operations inside the pass have added
                count.read = before[0] + sum(read.values())
                count.written = before[1] + sum(size for address, size in written.items() if address not in read)
            return out

        return run_and_count

    def count_launch(launch: object, *tensors: object) -> None:
        before = count.read, count.written
        run_launch(launch, *tensors)  # in Triton's interpreter with operations, which are replaced too
        moved = sum(find_large_tensors(tensors, smallest).values())
        count.read, count.written = before[0] + moved, before[1]  # read or written: only the sum is asked for

    kernels = list_implementations()[1:]
    launches = cast("Any", kernels[0]).Launch if kernels else None
    run_launch: Callable[..., None] = launches.__call__ if launches else lambda *_: None
    try:
        for name, run in passes.items():
            setattr(lean, name, counting(name, run))
        if launches:
            launches.__call__ = count_launch
        yield
    finally:
        for name, run in passes.items():
            setattr(lean, name, run)
        if launches:
            launches.__call__ = run_launch


def _select_read(name: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """Return the arguments that the pass ``name`` reads: see `ecanet.ops.passes.Passes`."""
    if name == "moments" and args[1] == 0:
        return ()
    if name == "grads" and args[-1] is None and getattr(args[2], "activation", None) is None:
        return args[:1]
    return args


def find_large_tensors(tree: object, smallest: int) -> dict[int, int]:
    """Return the address and the bytes of each tensor in ``tree`` that has at least ``smallest`` elements."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.numel() >= smallest]
    return {x.data_ptr(): x.nbytes for x in tensors}
