"""Time each kernel: in a profile of one training step, and each pass over memory alone."""

from collections import defaultdict

import torch
import variants
from setting import Setting
from timing import Step, interleave, summarize
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from variants import ECA

from ecanet import ops
from ecanet.ops.passes import Form

SHORT = 5.0
"""Microseconds below which a kernel counts as short: starting it costs about as much as running it."""


def profile_training(setting: Setting) -> dict[str, object]:
    """Return the kernels of one training step of ECA-ResNet, longest first; the whole trace goes to a file."""
    step = variants.make_training_step(variants.build(setting)[ECA].train(), setting.batch, setting)
    step()
    setting.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        setting.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        on_gpu = str(event.device_type).endswith("CUDA")
        if on_gpu == setting.on_gpu:  # a rehearsal lists the CPU's operations instead
            times[event.name[:80]].append(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    if setting.trace is not None:
        profiler.export_chrome_trace(str(setting.trace))
    every = [microseconds for found in times.values() for microseconds in found]
    short = [microseconds for microseconds in every if microseconds < SHORT]
    rows = sorted(times.items(), key=lambda row: -sum(row[1]))[:40]
    return {
        "launches": len(every),
        "ms": sum(every) / 1e3,
        "short_launches": len(short),
        "short_ms": sum(short) / 1e3,
        "longest": [{"kernel": name, "launches": len(found), "ms": sum(found) / 1e3} for name, found in rows],
    }


def time_passes(setting: Setting) -> dict[str, dict[str, dict[str, float]]]:
    """Return the microseconds and the bandwidth of each pass, and of convolutions with and without what follows."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for channels, side in setting.shapes:
        shape = f"{channels}x{side}x{side}"
        figures[shape] = measure_bandwidth(make_passes(channels, side, setting), setting)
        if channels > 64 or not setting.on_gpu:
            figures[shape] |= measure_bandwidth(make_expansions(channels, side, setting), setting)
        if side > 3:
            figures[shape] |= measure_bandwidth(make_convolutions(channels, side, setting), setting)
    return figures


def measure_bandwidth(steps: dict[str, tuple[Step, float]], setting: Setting) -> dict[str, dict[str, float]]:
    """Return the figures of steps that are given with the bytes that each moves."""
    with torch.no_grad():
        times = interleave({name: step for name, (step, _) in steps.items()}, setting)
    medians = {name: summarize(values)["median"] for name, values in times.items()}
    return {
        name: {"us": medians[name] * 1e3, "tb_per_second": moved / medians[name] / 1e9}
        for name, (_, moved) in steps.items()
    }


def draw(setting: Setting, *shape: int) -> Tensor:
    """Return random bfloat16 numbers on the device; in a rehearsal float32, which Triton's interpreter handles."""
    x = torch.randn(shape, device=setting.device, dtype=torch.bfloat16 if setting.on_gpu else torch.float32)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def make_passes(channels: int, side: int, setting: Setting) -> dict[str, tuple[Step, float]]:
    """Return each pass over planes of ``side`` x ``side``, with the bytes that it reads and writes.

    A mask of signs is one bit for each element: with 16-bit elements it is 1/16 of a tensor.
    """
    kernels = ops.list_implementations()[-1]
    z, shortcut, dy, second_dy = (draw(setting, setting.batch, channels, side, side) for _ in range(4))
    a, b, m = (torch.rand(setting.batch, channels, device=setting.device) for _ in range(3))
    mu = torch.rand(channels, device=setting.device)
    form, flat = Form(a=a, b=b, mu=mu, activation="relu"), Form(a=a, b=b, mu=mu)
    _, mask = kernels.apply(z, shortcut, form)
    tensor, bits = z.nbytes, z.numel() / 8
    return {
        "moments": (lambda: kernels.moments(z, 2), tensor),
        "apply": (lambda: kernels.apply(z, None, form), 2 * tensor),
        "apply, shortcut": (lambda: kernels.apply(z, shortcut, form), 3 * tensor + bits),
        "reduce": (lambda: kernels.reduce(dy, None, None, z, None, form), 2 * tensor),
        "reduce, two gradients": (lambda: kernels.reduce(dy, second_dy, mask, z, shortcut, form), 4 * tensor + bits),
        "grads": (lambda: kernels.grads(dy, z, flat, m, m, m), 3 * tensor),
        "grads, sign again": (lambda: kernels.grads(dy, z, form, m, m, m), 3 * tensor),
    }


def make_expansions(channels: int, side: int, setting: Setting) -> dict[str, tuple[Step, float]]:
    """Return a last 1x1 convolution with its block's end in one kernel, and PyTorch's convolution alone."""
    inner = channels // 4
    h, shortcut = (draw(setting, setting.batch, c, side, side) for c in (inner, channels))
    weight, gate = draw(setting, channels, inner), torch.rand(setting.batch, channels, device=setting.device)
    kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return {
        "expansion": (lambda: ops.expand(h, weight, None, gate, shortcut, "relu"), h.nbytes + 2 * shortcut.nbytes),
        "convolution alone": (lambda: nn.functional.conv2d(h, kernel), h.nbytes + shortcut.nbytes),
    }


def make_convolutions(channels: int, side: int, setting: Setting) -> dict[str, tuple[Step, float]]:
    """Return a 3x3 convolution with bias and ReLU by PyTorch's operations and, on a GPU, in cuDNN's one kernel."""
    x, bias = draw(setting, setting.batch, channels, side, side), draw(setting, channels)
    weight = draw(setting, channels, channels, 3, 3)
    geometry = ops.Geometry((1, 1), (1, 1), (1, 1), 1)

    def run_plain() -> Tensor:
        return nn.functional.conv2d(x, weight, bias, *geometry).relu_()

    found: dict[str, tuple[Step, float]] = {"3x3 convolution, then ReLU": (run_plain, 2 * x.nbytes)}
    if setting.on_gpu:
        fused = torch.cudnn_convolution_relu
        found["3x3 convolution with ReLU"] = (lambda: fused(x, weight, bias, *geometry), 2 * x.nbytes)
    return found
