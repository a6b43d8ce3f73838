"""Side-by-side timing with a correctness gate: nothing is timed that has not been checked first.

For each batch size the networks take turns in training and in inference, then the ends of their residual blocks do,
beside a copy of a large tensor, which says what the memory can do.
"""

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecanet.errors import ConfigError, check_positive_int
from ecanet.networks import find_device
from ecanet.report import environment
from ecanet.studies.bench import check as bench_check
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench import measure
from ecanet.studies.bench import networks as bench_networks
from ecanet.studies.bench.measure import Budget

__all__ = ["FULL", "QUICK", "run"]

QUICK = {"training": Budget(seconds=105), "inference": Budget(seconds=45), "layers": Budget(seconds=15)}
FULL = {phase: Budget(seconds=3 * budget.seconds, least=9) for phase, budget in QUICK.items()}
"""Time for the rounds of one batch size; more where the fewest rounds take longer."""

BATCH_SIZES = {("cpu", True): (8,), ("cpu", False): (1, 8, 32), ("cuda", True): (256,), ("cuda", False): (1, 32, 256)}
"""By device and ``quick``. A batch of 1 needs images large enough for a variance in the last stage."""

Row = dict[str, Any]


def run(
    *,
    device: str = "cpu",
    quick: bool = False,
    compiled: bool | None = None,
    batch_sizes: Sequence[int] | None = None,
    model: str = "resnet50",
    image_size: int = 224,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Check, time and count the ResNet ``model`` plain, with ECA and its peers, and the ends of its blocks alone.

    ``quick`` takes about four minutes on two cores. ``compiled`` adds `torch.compile`d networks (by default unless
    ``quick``). The result is what `bench_pages.write` writes: environment, checks, rows of networks and layers,
    ratios, copy bandwidth.

    Raises:
        ConfigError: the device is not there, a batch size is not positive or too large for the memory, a peer is not
            installed, or a check failed.
    """
    started = time.perf_counter()
    device = select_device(device)
    sizes = check_batch_sizes(batch_sizes or BATCH_SIZES.get((device, quick), ()))
    compiled = not quick if compiled is None else compiled
    if compiled:
        bench_check.check_compiler()
    budgets = QUICK if quick else FULL
    minutes = len(sizes) * sum(budget.seconds for budget in budgets.values()) / 60 + 1
    say(f"about {minutes:.0f} minutes{' and the compiling' if compiled else ''}; first the checks")
    networks = bench_networks.build(model, device)
    shapes = bench_networks.stages(networks["ecanet plain"], image_size)
    result: dict[str, Any] = {
        "format": 1,
        "environment": where(device, model, image_size),
        "checks": bench_check.check_networks(networks, image_size, device)
        + bench_check.check_layers(shapes, device, fused=device == "cuda"),
        "compile_seconds": {},
        "networks": [],
        "layers": [],
        "ratios": [],
        "copy": [],
    }
    say(f"{len(result['checks'])} checks passed")
    everything = networks | bench_networks.optimized(networks)
    fast = bench_networks.compiled(everything) if compiled else {}
    counts = count(networks, everything, image_size, device)
    for size in sizes:
        try:
            images = bench_networks.random_images(size, image_size, device)
            checks, seconds = bench_check.check_compiled(everything, fast, images, say)
            result["checks"] += checks
            result["compile_seconds"] |= {f"{name}, batch {size}": value for name, value in seconds.items()}
            time_networks(networks, everything, fast, images, budgets, counts, result)
            time_layers(shapes, size, device, budgets["layers"], result)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise ConfigError(f"batch size {size} does not fit the memory; give a smaller --batch-size") from None
    result["seconds"] = time.perf_counter() - started
    return result


def select_device(name: str) -> str:
    """Return "cpu" or "cuda" for the device ``name``. A numbered GPU becomes torch's current one.

    Raises:
        ConfigError: this machine does not have the device, or it is neither a CPU nor a CUDA GPU.
    """
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"the benchmark does not support device {str(device)!r}; choose cpu or cuda")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device.type


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return each of the batch sizes once.

    Raises:
        ConfigError: a batch size is not a positive integer.
    """
    return tuple(dict.fromkeys(check_positive_int("a batch size", size) for size in batch_sizes))


def count(
    networks: dict[str, nn.Module], everything: dict[str, nn.Module], image_size: int, device: str
) -> dict[tuple[str, str], float]:
    """MB an image that each phase of each eager network moves, by count, convolutions left out."""
    images = bench_networks.random_images(2, image_size, device)
    found = {}
    for name, network in everything.items():
        if name in networks:
            network.train()
            found["training", name] = measure.moved(bench_networks.train_step(network, images)) / len(images)
            bench_networks.forget(network)
        network.eval()
        with torch.no_grad():  # in inference mode convolutions go by other names
            found["inference", name] = measure.moved(lambda network=network: network(images)) / len(images)
    return found


def phases(networks: dict[str, Any], everything: dict[str, Any]) -> tuple[tuple[str, dict[str, Any], Any], ...]:
    """Training of ``networks``, inference of ``everything``, and what makes a step of each."""
    return (
        ("training", networks, bench_networks.train_step),
        ("inference", everything, bench_networks.eval_step),
    )


def time_networks(
    networks: dict[str, nn.Module],
    everything: dict[str, nn.Module],
    fast: dict[str, Any],
    images: torch.Tensor,
    budgets: dict[str, Budget],
    counts: dict[tuple[str, str], float],
    result: dict[str, Any],
) -> None:
    """Add the rows and ratios of the networks at one batch size to ``result``."""
    device, size = images.device.type, len(images)
    trainable = {name: network for name, network in fast.items() if name.removesuffix(" compiled") in networks}
    for phase, models, step in phases(networks | trainable, everything | fast):
        bench_networks.set_mode(everything, phase == "training")
        steps = {name: step(network, images) for name, network in models.items()}
        times = measure.interleaved(steps, budgets[phase], device=device, title=f"{phase}, batch {size}")
        for network in models.values():
            bench_networks.forget(network)
        for name, seconds in times.items():
            row = timed(seconds, batch_size=size, phase=phase, variant=name)
            row["images_per_second"] = size / measure.spread(seconds)["median"]
            if device == "cuda" or (phase == "training" and name in networks):
                row["memory_mb"] = measure.memory(steps[name], device)
                bench_networks.forget(models[name])
            row["moved_mb_per_image"] = counts.get((phase, name))
            result["networks"].append(row)
        for suffix in ("", " compiled"):
            pairs = [(first + suffix, second + suffix) for first, second in bench_networks.PAIRS]
            result["ratios"] += ratios(times, pairs, batch_size=size, phase=phase)
        pairs = [(name, name.removesuffix(" compiled")) for name in models if name in fast]
        result["ratios"] += ratios(times, pairs, batch_size=size, phase=phase)


def time_layers(
    shapes: list[tuple[int, int, int]], size: int, device: str, budget: Budget, result: dict[str, Any]
) -> None:
    """Add the rows and ratios of the blocks' ends at one batch size, and the copy's bandwidth, to ``result``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    steps: dict[tuple[tuple[int, ...], str], measure.Step] = {}
    for shape in shapes:
        block = bench_layers.block((size, *shape), device, dtype)
        part = bench_layers.steps(block, fused=device == "cuda")
        steps |= {((size, *shape), name): step for name, step in part.items()}
    copy, copied = measure.copy(device)
    times = measure.interleaved(
        steps | {((), "copy"): copy}, budget, device=device, title=f"ends of blocks, batch {size}"
    )
    rates = measure.spread(copied / seconds / 1e9 for seconds in times.pop(((), "copy")))
    result["copy"].append({"batch_size": size, "gb_per_second": rates})
    for (shape, name), seconds in times.items():
        row = timed(seconds, batch_size=size, shape=list(shape), variant=name)
        row["moved_mb"] = measure.moved(steps[shape, name])
        row["share_of_copy"] = row["moved_mb"] / row["ms"]["median"] / rates["median"]  # MB / ms = GB / s
        result["layers"].append(row)
    for shape in dict.fromkeys(shape for shape, _ in times):
        mine = {name: seconds for (at, name), seconds in times.items() if at == shape}
        result["ratios"] += ratios(mine, bench_layers.PAIRS, batch_size=size, phase="layers", shape=list(shape))


def timed(seconds: list[float], **what: Any) -> Row:
    """A row that says ``what`` took so long in each round."""
    return {**what, "ms": measure.spread(1e3 * s for s in seconds), "seconds": seconds}


def ratios(times: dict[str, list[float]], pairs: Sequence[tuple[str, str]], **what: Any) -> list[Row]:
    """A row for each of ``pairs`` of which both were timed."""
    return [
        {**what, "first": first, "second": second, **measure.ratio(times[first], times[second])}
        for first, second in pairs
        if first in times and second in times
    ]


def where(device: str, model: str, image_size: int) -> dict[str, Any]:
    """Where and with what this run is made."""
    import timm

    return environment() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "timm": timm.__version__,
        "commit": commit(),
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "layout": "channels_last",
        "model": model,
        "image_size": image_size,
    }


def commit() -> str | None:
    """The commit of this source, with "-dirty" where files differ from it; None outside a repository of its own."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    tracked = git("ls-files", "--error-unmatch", here.name)  # a package installed inside another repository is not
    return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*") if tracked else None


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
