"""Time networks and block tails side by side, after each has passed its checks.

For each batch size the networks take turns in training and in inference. Then the block tails are timed, next to a
large copy that measures memory bandwidth.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ecanet.errors import ConfigError, check_positive_int
from ecanet.networks import find_device
from ecanet.studies.bench import check as bench_check
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench import measure
from ecanet.studies.bench import networks as bench_networks
from ecanet.studies.bench.machine import describe_environment
from ecanet.studies.bench.measure import Budget
from ecanet.studies.bench.rows import CheckRow, LayerRow, NetworkRow, RatioRow, Result

__all__ = ["FULL", "QUICK", "run"]

QUICK = {"training": Budget(seconds=105), "inference": Budget(seconds=45), "layers": Budget(seconds=15)}
FULL = {phase: Budget(seconds=3 * budget.seconds, least=9) for phase, budget in QUICK.items()}
"""Time for the rounds of one batch size. They take longer if the fewest allowed rounds do."""

BATCH_SIZES = {("cpu", True): (8,), ("cpu", False): (1, 8, 32), ("cuda", True): (256,), ("cuda", False): (1, 32, 256)}
"""Batch sizes by device and ``quick``. A batch of 1 needs images large enough for a variance in the last stage."""


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The networks that are timed, by name."""

    trained: dict[str, nn.Module]
    """Networks for training and inference."""
    optimized: dict[str, nn.Module]
    """Copies for inference only."""
    compiled: dict[str, nn.Module]
    """The same networks and copies compiled, with " compiled" after their names; empty without the compiler."""
    pairs: tuple[tuple[str, str], ...]
    """Pairs whose times are divided, if both were timed."""

    @property
    def eager(self) -> dict[str, nn.Module]:
        """Every network that is not compiled."""
        return self.trained | self.optimized

    def select(self, phase: str) -> dict[str, nn.Module]:
        """Return the networks of one phase, "training" or "inference"."""
        if phase == "inference":
            return self.eager | self.compiled
        compiled = {name: net for name, net in self.compiled.items() if name.removesuffix(" compiled") in self.trained}
        return self.trained | compiled


def run(
    *,
    device: str = "cpu",
    quick: bool = False,
    compiled: bool | None = None,
    batch_sizes: Sequence[int] | None = None,
    model: str = "resnet50",
    image_size: int = 224,
    say: Callable[[str], None] = print,
) -> Result:
    """Check, time and count a ResNet without attention, with ECA and its peers, and its block tails alone.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        quick: Whether to use one batch size and fewer rounds, which takes about four minutes on two cores.
        compiled: Whether to add the networks compiled by `torch.compile` (default: unless ``quick``).
        batch_sizes: Images in a batch, one or more numbers (default: 1, 8, 32 on a CPU and 1, 32, 256 on a GPU).
        model: Name of a ResNet that this library, torchvision and timm have.
        image_size: Height and width of the images in pixels.
        say: Function that receives each line of progress.

    Returns:
        Environment, checks, rows of networks and block tails, ratios and copy bandwidth; `write` writes it.

    Raises:
        ConfigError: this machine does not have the device, a batch size is not positive or needs more memory than there
            is, a peer is not installed, or a check failed.
    """
    started = time.perf_counter()
    device = select_device(device)
    sizes = check_batch_sizes(batch_sizes or BATCH_SIZES.get((device, quick), ()))
    compiled = not quick if compiled is None else compiled
    if compiled:
        bench_check.check_compiler()
    budgets = QUICK if quick else FULL
    minutes = len(sizes) * sum(budget.seconds for budget in budgets.values()) / 60 + 1
    networks = bench_networks.build(model, device)
    say(f"checking, then timing for about {minutes:.0f} minutes{', compiling not included' if compiled else ''}")
    shapes = bench_networks.list_stage_shapes(networks["ecanet plain"], image_size)
    checks = bench_check.check_networks(networks, image_size, device)
    checks += bench_check.check_layers(shapes, device, fused=device == "cuda")
    say(f"{len(checks)} checks passed")
    result = make_result(describe_environment(device, model, image_size), checks)
    variants = make_variants(networks, compiled)
    counts = count_traffic(variants, bench_networks.make_images(2, image_size, device))
    for size in sizes:
        with explain_memory(size):
            images = bench_networks.make_images(size, image_size, device)
            add_compiled_checks(variants, images, result, say)
            time_networks(variants, images, budgets, counts, result)
            time_layers(shapes, size, device, budgets["layers"], result)
    result["seconds"] = time.perf_counter() - started
    return result


@contextmanager
def explain_memory(batch_size: int) -> Generator[None]:
    """Turn PyTorch's errors of too little memory into one line.

    Raises:
        ConfigError: the batch needs more memory than there is.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"batch size {batch_size} needs more memory than there is; use a smaller --batch-size"
        ) from None


def make_result(environment: dict[str, object], checks: list[CheckRow]) -> Result:
    """Return a result without times."""
    return {
        "format": 1,
        "environment": environment,
        "checks": checks,
        "compile_seconds": {},
        "networks": [],
        "layers": [],
        "ratios": [],
        "copy": [],
        "seconds": 0.0,
    }


def make_variants(networks: dict[str, nn.Module], compiled: bool) -> Variants:
    """Return ``networks`` with the optimized copies of this library's, and all of them compiled if ``compiled``."""
    optimized = bench_networks.optimize_ours(networks)
    fast = bench_networks.compile_networks(networks | optimized) if compiled else {}
    return Variants(trained=networks, optimized=optimized, compiled=fast, pairs=bench_networks.PAIRS)


def add_compiled_checks(variants: Variants, images: Tensor, result: Result, say: Callable[[str], None]) -> None:
    """Compile the networks for ``images``, check them, and add checks and seconds to ``result``."""
    checks, seconds = bench_check.check_compiled(variants.eager, variants.compiled, images, say)
    result["checks"] += checks
    result["compile_seconds"] |= {f"{name}, batch {len(images)}": value for name, value in seconds.items()}


def select_device(name: str) -> str:
    """Return "cpu" or "cuda" for the device ``name``. A numbered GPU becomes torch's current one.

    Raises:
        ConfigError: this machine does not have the device, or it is neither a CPU nor a CUDA GPU.
    """
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"the benchmark does not support device {str(device)!r}; choose cpu or cuda")
    if device.index is not None:  # pyright: ignore[reportUnnecessaryComparison]
        torch.cuda.set_device(device)
    return device.type


def check_batch_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return each of the batch sizes once.

    Raises:
        ConfigError: a batch size is not a positive integer.
    """
    return tuple(dict.fromkeys(check_positive_int("a batch size", size) for size in batch_sizes))


def count_traffic(variants: Variants, images: Tensor) -> dict[tuple[str, str], float]:
    """Return the MB per image that each eager network moves in each phase, by count and without convolutions."""
    found: dict[tuple[str, str], float] = {}
    for name, network in variants.eager.items():
        if name in variants.trained:
            step = bench_networks.make_train_step(network.train(), images)
            found["training", name] = measure.count_moved_mb(step) / len(images)
            bench_networks.clear_gradients(network)
        network.eval()
        with torch.no_grad():  # in inference mode PyTorch's convolutions have other names
            inputs = bench_networks.make_inputs(network, images)
            found["inference", name] = measure.count_moved_mb(partial(network, inputs)) / len(images)
    return found


def time_networks(
    variants: Variants,
    images: Tensor,
    budgets: Mapping[str, Budget],
    counts: Mapping[tuple[str, str], float],
    result: Result,
) -> None:
    """Time the networks at one batch size, and add their rows and ratios to ``result``."""
    device, size = images.device.type, len(images)
    for phase in ("training", "inference"):
        make_step = bench_networks.make_train_step if phase == "training" else bench_networks.make_eval_step
        networks = variants.select(phase)
        bench_networks.set_mode(variants.eager.values(), phase == "training")
        steps = {name: make_step(network, images) for name, network in networks.items()}
        times = measure.interleave(steps, budgets[phase], device=device, title=f"{phase}, batch {size}")
        for network in networks.values():
            bench_networks.clear_gradients(network)
        for name, seconds in times.items():
            row: NetworkRow = {
                "batch_size": size,
                "phase": phase,
                "variant": name,
                "ms": measure.compute_spread(1e3 * s for s in seconds),
                "seconds": seconds,
                "images_per_second": size / measure.compute_spread(seconds)["median"],
                "moved_mb_per_image": counts.get((phase, name)),
            }
            if device == "cuda" or (phase == "training" and name in variants.trained):
                row["memory_mb"] = measure.measure_memory(steps[name], device)
                bench_networks.clear_gradients(networks[name])
            result["networks"].append(row)
        for suffix in ("", " compiled"):
            pairs = [(first + suffix, second + suffix) for first, second in variants.pairs]
            result["ratios"] += compute_ratios(times, pairs, batch_size=size, phase=phase)
        pairs = [(name, name.removesuffix(" compiled")) for name in networks if name in variants.compiled]
        result["ratios"] += compute_ratios(times, pairs, batch_size=size, phase=phase)


def time_layers(shapes: list[tuple[int, int, int]], size: int, device: str, budget: Budget, result: Result) -> None:
    """Time the block tails at one batch size, and add their rows and ratios and the copy's bandwidth to ``result``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    steps: dict[tuple[tuple[int, ...], str], measure.Step] = {}
    for shape in shapes:
        block = bench_layers.make_block((size, *shape), device, dtype)
        block_steps = bench_layers.make_steps(block, fused=device == "cuda")
        steps |= {((size, *shape), name): step for name, step in block_steps.items()}
    copy, copied = measure.make_copy(device)
    title = f"block tails, batch {size}"
    times = measure.interleave({**steps, ((), "copy"): copy}, budget, device=device, title=title)
    rates = measure.compute_spread(copied / seconds / 1e9 for seconds in times.pop(((), "copy")))
    result["copy"].append({"batch_size": size, "gb_per_second": rates})
    for (shape, name), seconds in times.items():
        ms, moved = measure.compute_spread(1e3 * s for s in seconds), measure.count_moved_mb(steps[shape, name])
        row: LayerRow = {
            "batch_size": size,
            "shape": list(shape),
            "variant": name,
            "ms": ms,
            "seconds": seconds,
            "moved_mb": moved,
            "share_of_copy": moved / ms["median"] / rates["median"],  # MB / ms = GB / s
        }
        result["layers"].append(row)
    for shape in dict.fromkeys(shape for shape, _ in times):
        of_shape = {name: seconds for (other, name), seconds in times.items() if other == shape}
        pairs = bench_layers.PAIRS
        result["ratios"] += compute_ratios(of_shape, pairs, batch_size=size, phase="layers", shape=list(shape))


def compute_ratios(
    times: Mapping[str, list[float]],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    phase: str,
    shape: list[int] | None = None,
) -> list[RatioRow]:
    """Return one row for each of ``pairs`` if both of its variants were timed."""
    rows: list[RatioRow] = []
    for first, second in pairs:
        if first in times and second in times:
            ratio = measure.compute_ratio(times[first], times[second])
            row: RatioRow = {"batch_size": batch_size, "phase": phase, "first": first, "second": second, **ratio}
            if shape is not None:
                row["shape"] = shape
            rows.append(row)
    return rows
