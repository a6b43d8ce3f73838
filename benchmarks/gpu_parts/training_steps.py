"""Time training steps: eager, in a CUDA graph, compiled."""

import time
from collections.abc import Callable, Mapping

import torch
import variants
from setting import Setting
from timing import capture, compare, interleave, measure_enqueueing, measure_peak_memory, summarize
from torch import Tensor
from variants import ECA, LEAN, PLAIN


def time_eager(setting: Setting) -> dict[str, object]:
    """Time eager steps of all variants at the large batch; with peak memory and the time to enqueue a step."""
    return time_batch(setting, setting.batch, list(variants.build(setting)))


def time_small_batch(setting: Setting) -> dict[str, object]:
    """Time eager steps at the small batch, where Python's time to launch kernels may be the limit."""
    return time_batch(setting, setting.small_batch, [name for name in variants.build(setting) if name != LEAN])


def time_batch(setting: Setting, batch: int, names: list[str]) -> dict[str, object]:
    """Time eager training steps of the networks called ``names`` at ``batch``."""
    found = variants.build(setting)
    steps = {name: variants.make_training_step(found[name].train(), batch, setting, name) for name in names}
    extra: dict[str, dict[str, float | None]] = {}
    for name, step in steps.items():
        extra[name] = {"peak_mb": measure_peak_memory(step, setting), "enqueue_ms": measure_enqueueing(step, setting)}
        variants.clear_gradients(found[name])
    figures = summarize_steps(interleave(steps, setting), batch, setting)
    for name in names:
        variants.clear_gradients(found[name])
    return figures | {"single_step": extra}


def time_graphs(setting: Setting) -> dict[str, object]:
    """Time the replay of CUDA graphs of whole training steps: Python then costs nothing.

    The graphs are captured and timed one after the other, because each holds the memory of a whole step.
    """
    times: dict[str, list[float]] = {}
    for name, network in variants.build(setting).items():
        if name == LEAN:
            continue
        replay = capture(variants.make_training_step(network.train(), setting.batch, setting), setting)
        times |= interleave({name: replay}, setting)
        del replay
        variants.clear_gradients(network)
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return summarize_steps(times, setting.batch, setting)


def time_compiled(setting: Setting) -> dict[str, object]:
    """Time compiled training steps, and how long compiling takes."""
    steps: dict[str, Callable[[], Tensor]] = {}
    seconds: dict[str, float] = {}
    found = variants.build(setting)
    torch.compiler.reset()
    for name in ("torchvision plain", ECA):
        if name not in found:
            continue
        compiled = torch.compile(found[name].train(), dynamic=False, backend=setting.compiler)
        steps[name] = variants.make_training_step(compiled, setting.batch, setting)
        started = time.monotonic()
        steps[name]()
        setting.synchronize()
        seconds[name] = time.monotonic() - started
    return summarize_steps(interleave(steps, setting), setting.batch, setting) | {"compile_seconds": seconds}


def summarize_steps(times: Mapping[str, list[float]], batch: int, setting: Setting) -> dict[str, object]:
    """Return times, rates and ratios to plain and timm's networks, and the implementation that ran."""
    return {
        "batch": batch,
        "impl": variants.name_impl(setting, torch.bfloat16),
        "ms": {name: summarize(values) for name, values in times.items()},
        "images_per_second": {name: batch / summarize(values)["median"] * 1e3 for name, values in times.items()},
        "ratios": compare(times, PLAIN) | compare(times, "torchvision plain") | compare(times, "timm eca"),
    }
