"""The gate before the clock: nothing is timed that does not give what it should.

Each check is a relative error and what is allowed; the first that is too large ends the run.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference import optimize
from ecanet.models import load_state_dict, renamed
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench.layers import Block
from ecanet.studies.bench.networks import eval_step, forget, random_images, train_step
from ecanet.testing import bound_relative_error, describe_excess, measure_relative_error

Check = dict[str, Any]

ODD = (3, 17, 17, 19)
"""A shape that is a multiple of nothing."""

TWINS = (("ecanet plain", "torchvision plain"), ("ecanet eca", "timm eca"))
"""Networks of two libraries that are the same function of the same weights."""

COMPILED_ALLOWED = {"cpu": (1e-3, 1e-2), "cuda": (0.05, 0.3)}
"""Of a compiled network's logits and gradients, against the eager one's: float32, and bfloat16 through 50 layers.

Gradients may differ more where those of the eager network do, for images that differ in their last digit: at its first
step a ResNet-50 is chaotic, since rounding decides which ReLUs are open.
"""


def check(what: str, error: float, allowed: float) -> Check:
    """The check as a row.

    Raises:
        ConfigError: ``error`` is larger than ``allowed``, or not a number.
    """
    excess = describe_excess(what, error, allowed)
    if excess is not None:
        raise ConfigError(f"{excess} (relative error): nothing was timed")
    return {"what": what, "error": error, "allowed": allowed}


def check_layers(shapes: list[tuple[int, int, int]], device: str, *, fused: bool) -> list[Check]:
    """Value and all gradients of each step of `bench_layers`, in the dtypes that are timed, against float64."""
    found = []
    for shape in [ODD, *((2, *shape) for shape in shapes)]:
        for dtype in (torch.float32, *((torch.bfloat16,) if device == "cuda" else ())):
            b = without_ties(bench_layers.block(shape, device, dtype))
            reference = bench_layers.steps(b)["tail reference"]()
            wide = bench_layers.oracle(b, "tail reference")
            allowed = bound_relative_error(reference, wide, dtype)
            for name, step in bench_layers.steps(b, fused=fused).items():
                if dtype == torch.float32 or name not in bench_layers.PEERS:
                    error = measure_relative_error(step(), bench_layers.oracle(b, name))
                    found.append(check(f"{name} {shape} {str(dtype).removeprefix('torch.')}", error, allowed))
    return found


def without_ties(b: Block) -> Block:
    """``b`` with no gradient where rounding decides whether ReLU passes it: each such place is an error of its own."""
    wide = b.double()
    with torch.no_grad():
        x = wide.norm(wide.z)
        sums = (x + wide.shortcut, ops.squeeze_scale(x, wide.gate.weigh, impl="reference") + wide.shortcut)
        near = torch.stack([y.abs() < torch.finfo(b.dy.dtype).eps ** 0.5 for y in sums]).any(0)
    return replace(b, dy=b.dy.masked_fill(near, 0))


def check_networks(networks: dict[str, nn.Module], image_size: int, device: str) -> list[Check]:
    """Logits and gradients of this library's networks against the twins with the same weights, all in float64."""
    found = []
    images = random_images(2, min(image_size, 64), device).double()
    for mine, peer in TWINS:
        theirs = with_random_norms(copy.deepcopy(networks[peer]).double())
        ours = copy.deepcopy(networks[mine]).double()
        load_state_dict(ours, theirs.state_dict())
        logits, gradients = trained(ours, images)
        expected, wanted = trained(theirs, images)
        found.append(check(f"{mine}: logits in training", measure_relative_error([logits], [expected]), 1e-8))
        wanted = renamed(wanted, ours)
        error = measure_relative_error(gradients.values(), (wanted[name] for name in gradients))
        found.append(check(f"{mine}: gradients", error, 1e-6))
        # with the statistics of that one step
        expected = eval_step(theirs.eval(), images)()
        error = measure_relative_error([eval_step(ours.eval(), images)()], [expected])
        found.append(check(f"{mine}: logits in evaluation", error, 1e-8))
        kind = mine.split()[1]
        error = measure_relative_error([eval_step(optimize(ours), images)()], [expected])
        found.append(check(f"optimized {kind}: logits", error, 1e-8))
    return found


def with_random_norms(network: nn.Module) -> nn.Module:
    """``network``, each norm with weights that are neither 0 nor 1, and statistics that one step makes its own."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            values = torch.rand(2, module.num_features, generator=generator)
            module.weight.data.copy_(0.5 + values[0])
            module.bias.data.copy_(values[1] - 0.5)
    return network


def trained(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients by name of one training step, after which the norms have the statistics of ``images``."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    logits = train_step(network.train(), images)()
    return logits, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def check_compiler() -> None:
    """Raise ConfigError unless `torch.compile` works here."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8))
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"torch.compile does not work here ({why}); use --no-compile") from None


def check_compiled(
    eager: dict[str, nn.Module], compiled: dict[str, Any], images: Tensor, say: Callable[[str], None]
) -> tuple[list[Check], dict[str, float]]:
    """Call all for ``images``, in inference and training, beside the eager ones; the checks, and seconds by variant."""
    found: list[Check] = []
    seconds: dict[str, float] = {}
    for name, fast in compiled.items():
        # the networks share a class, and its limit would send the later ones back to eager without a word
        with torch._dynamo.config.patch(recompile_limit=256):
            checks, seconds[name] = check_one_compiled(name, fast, eager[name.removesuffix(" compiled")], images)
        found += checks
        say(f"{name}: compiled for batch {len(images)} in {seconds[name]:.0f} s")
    return found, seconds


def check_one_compiled(name: str, fast: Any, network: nn.Module, images: Tensor) -> tuple[list[Check], float]:
    """The checks of one compiled network, and the seconds of its first calls."""
    allowed, allowed_gradient = COMPILED_ALLOWED[images.device.type]
    network.eval()
    wanted = eval_step(network, images)()
    started = time.perf_counter()
    logits = eval_step(fast, images)()
    seconds = time.perf_counter() - started
    found = [check(f"{name}: logits, batch {len(images)}", measure_relative_error([logits], [wanted]), allowed)]
    if any(p.requires_grad for p in network.parameters()):  # not a copy for inference
        network.train()
        wanted = gradients(network, network, images)
        chaos = measure_relative_error([gradients(network, network, nudged(images))], [wanted])
        started = time.perf_counter()
        got = gradients(fast, network, images)
        seconds += time.perf_counter() - started
        allowed_gradient = max(allowed_gradient, 4 * chaos)
        error = measure_relative_error([got], [wanted])
        found.append(check(f"{name}: gradients, batch {len(images)}", error, allowed_gradient))
    return found, seconds


def nudged(images: Tensor) -> Tensor:
    """``images``, each number changed in its last digit."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, images.shape, generator=generator).to(images) - 1
    return images * (1 + torch.finfo(images.dtype).eps * signs)


def gradients(step: Any, network: nn.Module, images: Tensor) -> Tensor:
    """All gradients of ``network``, in one row, after a training step of it or of its compiled twin ``step``."""
    train_step(step, images)()
    found = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    forget(network)
    return found
