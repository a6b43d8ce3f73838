"""Side-by-side timing with a correctness gate: nothing is timed that has not been checked first.

Variants take turns within one run (A B C, A B C, ...), so that what slows the machine slows them alike; a ratio is
the median over rounds of two variants' times in the same round, its spread the quartiles.
"""

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecanet import models, ops, traffic
from ecanet.attention.gates import ECA
from ecanet.errors import ConfigError
from ecanet.inference import optimize

Step = Callable[[], object]

PAIRS = (
    ("ecanet eca", "ecanet plain"),
    ("ecanet eca", "timm eca"),
    ("ecanet eca", "timm se"),
    ("ecanet eca", "torchvision plain"),
    ("timm eca", "torchvision plain"),
    ("optimized eca", "optimized plain"),
    ("optimized eca", "ecanet eca"),
    ("optimized eca", "timm eca"),
)
"""What is divided by what, where both were timed: below 1 the first is faster."""


def run(
    *,
    device: str = "cpu",
    quick: bool = False,
    compiled: bool = False,
    batch_size: int = 8,
    image_size: int = 224,
    rounds: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Check, time and count ResNet-50 plain, with ECA and its peers; print the table and give the result.

    ``quick`` takes about four minutes on two cores. ``compiled`` adds `torch.compile`d variants. With ``out`` the
    result is written there as JSON, and a plot beside it.

    Raises:
        ConfigError: the device is not there, a peer is not installed, or a check failed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available here; use device='cpu'")
    check(device)
    result: dict[str, Any] = {"environment": environment(device, batch_size, image_size), "timings": {}, "ratios": {}}
    networks = build(device)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    rounds = rounds or (7 if quick else 15)
    training = {name: train_step(model, images) for name, model in networks.items()}
    evaluated = dict(networks)
    evaluated |= {f"optimized {kind}": optimize(networks[f"ecanet {kind}"]) for kind in ("plain", "eca")}
    inference = {name: eval_step(model, images) for name, model in evaluated.items()}
    if compiled:
        training |= {f"{n} compiled": train_step(torch.compile(m), images) for n, m in networks.items()}  # type: ignore
        inference |= {f"{n} compiled": eval_step(torch.compile(m), images) for n, m in networks.items()}  # type: ignore
    for phase, steps, repeats in (("training", training, rounds), ("inference", inference, 3 * rounds)):
        set_mode(networks, phase == "training")
        times = interleaved(steps, repeats, device, phase)
        result["timings"][phase] = {name: summary(values, batch_size) for name, values in times.items()}
        result["ratios"][phase] = ratios(times)
    result["memory"] = memory(networks, images)
    result["passes"] = passes(evaluated, image_size, device)
    print_table(result)
    if out is not None:
        save(result, out)
    return result


def build(device: str) -> dict[str, nn.Module]:
    """ResNet-50 with 1000 classes: this library's, timm's and torchvision's, all channels-last."""
    try:
        from timm.models import resnet
    except ImportError as error:
        raise ConfigError("the benchmark compares with timm: pip install timm") from error
    from torchvision.models import resnet50

    torch.manual_seed(0)
    shape = [3, 4, 6, 3]
    networks: dict[str, nn.Module] = {
        "ecanet plain": models.create_model("resnet50", attention="none"),
        "ecanet eca": models.create_model("resnet50", attention="eca"),
        "timm eca": resnet.ResNet(resnet.Bottleneck, shape, block_args={"attn_layer": "eca"}),  # pyright: ignore[reportArgumentType]
        "timm se": resnet.ResNet(resnet.Bottleneck, shape, block_args={"attn_layer": "se"}),  # pyright: ignore[reportArgumentType]
        "torchvision plain": resnet50(),
    }
    return {
        name: model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for name, model in networks.items()
    }


def set_mode(networks: dict[str, nn.Module], training: bool) -> None:
    """Training or evaluation, for all."""
    for model in networks.values():
        model.train(training)


def train_step(model: Any, images: Tensor) -> Step:
    """Forward, loss and backward (no optimizer: it is the same for all)."""
    labels = torch.arange(len(images), device=images.device)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()

    return step


def eval_step(model: Any, images: Tensor) -> Step:
    """Forward without gradients."""

    def step() -> None:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            model(images)

    return step


def check(device: str) -> None:
    """Raise ConfigError unless value and gradients of the fast tail, and optimize()'s outputs, are the reference's."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 28, 28), (3, 17, 17, 19), (1, 256, 7, 7)):
        norm, gate = nn.BatchNorm2d(shape[1]).to(device), ECA(shape[1]).to(device)
        z, s, dy = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        found = []
        for impl in ("reference", "auto"):
            a, b = z.detach().requires_grad_(), s.detach().requires_grad_()
            y = ops.residual_tail(a, norm, gate.weigh, b, impl=impl)  # type: ignore[arg-type]
            found.append([y, *torch.autograd.grad(y, [a, b, *norm.parameters(), *gate.parameters()], dy)])
        for x, y in zip(*found, strict=True):
            if (x - y).norm() > 1e-5 * x.norm() + 1e-6:
                raise ConfigError(f"the tail is wrong for shape {shape}: nothing is timed")
    model = models.create_model("resnet18", attention="eca").to(device).eval()
    x = torch.randn(4, 3, 64, 64, generator=generator).to(device)
    with torch.no_grad():
        if (model(x) - optimize(model)(x)).norm() > 1e-5 * model(x).norm():
            raise ConfigError("optimize() changes the outputs: nothing is timed")


def interleaved(steps: dict[str, Step], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns from round to round, and the first two rounds warm up."""
    from rich.progress import track

    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(-2, rounds), description=f"timing {title}"):
        for shift in range(len(names)):
            name = names[(index + shift) % len(names)]
            started = clock(device)
            steps[name]()
            seconds = clock(device) - started
            if index >= 0:
                times[name].append(seconds)
    return times


def clock(device: str) -> float:
    """Now, after all that the device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(values: list[float], batch_size: int) -> dict[str, float]:
    """Median and quartiles in milliseconds, and images per second."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "median_ms": 1e3 * middle,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "images_per_second": batch_size / middle,
    }


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Time of one variant over that of another, round by round: median and quartiles."""
    found = {}
    for first, second in PAIRS:
        for suffix in ("", " compiled"):
            a, b = times.get(first + suffix), times.get(second + suffix)
            if a and b:
                quotients = [x / y for x, y in zip(a, b, strict=True)]
                low, middle, high = statistics.quantiles(quotients, n=4) if len(a) > 1 else quotients * 3
                found[f"{first}{suffix} / {second}{suffix}"] = {"median": middle, "low": low, "high": high}
    return found


def memory(networks: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """What a training step holds, MB an image: CUDA's peak, or on a CPU what autograd keeps for the backward."""
    held = {}
    set_mode(networks, True)
    for name, model in networks.items():
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            train_step(model, images)()
            size = torch.cuda.max_memory_allocated()
        else:
            size = traffic.saved(lambda model=model: model(images[:2])) * len(images) / 2
        held[name] = size / len(images) / 1e6
    return held


def passes(networks: dict[str, nn.Module], image_size: int, device: str) -> dict[str, float]:
    """MB an image that PyTorch's operations move in a forward without gradients, convolutions left out, by count."""
    x = torch.randn(1, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    counts = {}
    for name, model in networks.items():
        model.eval()
        with torch.no_grad(), traffic.counted(smallest=4096) as moved:
            model(x)
        counts[name] = moved.moved / 1e6
    return counts


def environment(device: str, batch_size: int, image_size: int) -> dict[str, Any]:
    """Where and with what this run was made."""
    import timm
    import torchvision

    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {cpu_name()}",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "layout": "channels_last",
        "batch_size": batch_size,
        "image_size": image_size,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "commit": git.stdout.strip() or None,
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def print_table(result: dict[str, Any]) -> None:
    """The side-by-side table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    where = result["environment"]
    for phase, timings in result["timings"].items():
        table = Table(
            title=f"ResNet-50 {phase}, batch {where['batch_size']}, {where['machine']}, torch {where['torch']}"
        )
        for column in (
            "network",
            "ms",
            "quartiles",
            "images/s",
            "saved MB/image" if phase == "training" else "moved MB/image",
        ):
            table.add_column(column, justify="left" if column == "network" else "right")
        extra = result["memory"] if phase == "training" else result["passes"]
        for name, t in timings.items():
            spread = f"{t['low_ms']:.0f} to {t['high_ms']:.0f}"
            more = f"{extra[name]:.1f}" if name in extra else ""
            table.add_row(name, f"{t['median_ms']:.0f}", spread, f"{t['images_per_second']:.1f}", more)
        console.print(table)
        for pair, r in result["ratios"][phase].items():
            console.print(f"  {pair}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}) of the time")


def save(result: dict[str, Any], out: Path) -> None:
    """Write the JSON, whole or not at all, and a plot of the images per second beside it."""
    assert all(math.isfinite(t["median_ms"]) for phase in result["timings"].values() for t in phase.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    plot(result, out.with_suffix(".png"))


def plot(result: dict[str, Any], path: Path) -> None:
    """Images per second of each variant, training and inference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (phase, timings) in zip(figure.subplots(1, 2), result["timings"].items(), strict=True):
        axes.barh(list(timings), [t["images_per_second"] for t in timings.values()])
        axes.invert_yaxis()
        axes.set_title(phase)
        axes.set_xlabel("images per second")
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=120)
    partial.replace(path)
