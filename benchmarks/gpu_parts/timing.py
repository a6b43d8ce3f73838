"""Time steps on a device: variants take turns, so that a slower phase of the machine slows them all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from setting import Setting

Step = Callable[[], object]
Spread = dict[str, float]


def interleave(steps: Mapping[str, Step], setting: Setting) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each round; the order of the steps turns by one from round to round.

    A figure is the mean over a few calls with one synchronisation after them, as in a training loop.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(setting.calls):  # warm up
            steps[name]()
    for turn in range(setting.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            setting.synchronize()
            started = time.perf_counter()
            for _ in range(setting.calls):
                steps[name]()
            setting.synchronize()
            times[name].append((time.perf_counter() - started) * 1e3 / setting.calls)
    return times


def summarize(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of ``values``."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median, "low": low, "high": high}


def compare(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Return each variant's time divided by that of ``base`` in the same round: below 1 the variant is faster."""
    return {
        f"{name} / {base}": summarize([x / y for x, y in zip(times[name], times[base], strict=True)])
        for name in times
        if base in times and name != base
    }


def measure_enqueueing(step: Step, setting: Setting) -> float:
    """Return the milliseconds that Python needs to enqueue one step.

    A step cannot take less, however fast its kernels are.
    """
    setting.synchronize()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    setting.synchronize()
    return seconds * 1e3


def measure_peak_memory(step: Step, setting: Setting) -> float | None:
    """Return the MB that ``step`` allocates at its peak, without what was allocated before; None on a CPU."""
    if not setting.on_gpu:
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def capture(step: Step, setting: Setting) -> Step:
    """Return a function that replays ``step`` as a CUDA graph; on a CPU, which has no graphs, ``step`` itself.

    The step runs three times first, on a stream of its own, as CUDA graphs require.
    """
    if not setting.on_gpu:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
