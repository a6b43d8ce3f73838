"""Check everything before it is timed.

Each check compares a relative error with what is allowed. The first error that is too large ends the run.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference import optimize
from ecanet.models import load_state_dict, rename
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench.layers import Block
from ecanet.studies.bench.networks import clear_gradients, make_eval_step, make_images, make_train_step
from ecanet.studies.bench.rows import CheckRow
from ecanet.testing import bound_relative_error, describe_excess, measure_relative_error

ODD = (3, 17, 17, 19)
"""A shape (N, C, H, W) that is no multiple of any tile size."""

EQUAL = (("ecanet plain", "torchvision plain"), ("ecanet eca", "timm eca"))
"""Networks of two libraries that are the same function of the same weights."""

COMPILED_ALLOWED = {"cpu": (1e-3, 1e-2), "cuda": (0.05, 0.3)}
"""Allowed relative errors of a compiled network's logits and gradients to those of the eager one.

On a CPU they are for float32, on a GPU for bfloat16 through 50 layers. Gradients may differ more if the eager network's
gradients do so too when the images change in their last digit: rounding decides which ReLUs pass a gradient, so the
first step of a ResNet-50 is chaotic.
"""


def check_error(what: str, error: float, allowed: float) -> CheckRow:
    """Return the passed check as a row.

    Raises:
        ConfigError: ``error`` is larger than ``allowed``, or not a number.
    """
    excess = describe_excess(what, error, allowed)
    if excess is not None:
        raise ConfigError(f"{excess} (relative error): nothing was timed")
    return {"what": what, "error": error, "allowed": allowed}


def check_layers(shapes: list[tuple[int, int, int]], device: str, *, fused: bool) -> list[CheckRow]:
    """Check the output and all gradients of each step of `layers`, in the dtypes that are timed, against float64.

    Args:
        shapes: Channels, height and width of the tails.
        device: "cpu" or "cuda".
        fused: Whether to check the Triton kernels too.

    Raises:
        ConfigError: an error is too large.
    """
    found: list[CheckRow] = []
    for shape in [ODD, *((2, *shape) for shape in shapes)]:
        for dtype in (torch.float32, *((torch.bfloat16,) if device == "cuda" else ())):
            b = remove_ties(bench_layers.make_block(shape, device, dtype))
            reference = bench_layers.make_steps(b)["tail reference"]()
            wide = bench_layers.compute_oracle(b, "tail reference")
            allowed = bound_relative_error(reference, wide, dtype)
            for name, step in bench_layers.make_steps(b, fused=fused).items():
                if dtype == torch.float32 or name not in bench_layers.PEERS:
                    error = measure_relative_error(step(), bench_layers.compute_oracle(b, name))
                    found.append(check_error(f"{name} {shape} {str(dtype).removeprefix('torch.')}", error, allowed))
    return found


def remove_ties(b: Block) -> Block:
    """Return ``b`` with a gradient of zero wherever rounding decides whether the ReLU passes it.

    At such a place two right implementations may differ by the whole gradient.
    """
    wide = b.double()
    with torch.no_grad():
        x = wide.norm(wide.z)
        sums = (x + wide.shortcut, ops.squeeze_scale(x, wide.gate.weigh, impl="reference") + wide.shortcut)
        near = torch.stack([y.abs() < torch.finfo(b.dy.dtype).eps ** 0.5 for y in sums]).any(0)
    return replace(b, dy=b.dy.masked_fill(near, 0))


def check_networks(networks: dict[str, nn.Module], image_size: int, device: str) -> list[CheckRow]:
    """Check logits and gradients of this library's networks against their peers with the same weights, in float64.

    Raises:
        ConfigError: an error is too large.
    """
    found: list[CheckRow] = []
    images = make_images(2, min(image_size, 64), device).double()
    for name, peer in EQUAL:
        theirs = randomize_norms(copy.deepcopy(networks[peer]).double())
        ours = copy.deepcopy(networks[name]).double()
        load_state_dict(ours, theirs.state_dict())
        logits, gradients = run_training_step(ours, images)
        expected, expected_gradients = run_training_step(theirs, images)
        found.append(check_error(f"{name}: logits in training", measure_relative_error(logits, expected), 1e-8))
        expected_gradients = rename(expected_gradients, ours)
        error = measure_relative_error(gradients.values(), (expected_gradients[key] for key in gradients))
        found.append(check_error(f"{name}: gradients", error, 1e-6))
        # evaluation uses the running statistics of that one step
        expected = make_eval_step(theirs.eval(), images)()
        error = measure_relative_error(make_eval_step(ours.eval(), images)(), expected)
        found.append(check_error(f"{name}: logits in evaluation", error, 1e-8))
        error = measure_relative_error(make_eval_step(optimize(ours), images)(), expected)
        found.append(check_error(f"optimized {name.split()[1]}: logits", error, 1e-8))
    return found


def randomize_norms(network: nn.Module) -> nn.Module:
    """Give each batch norm of ``network`` random weights, which are neither 0 nor 1, and return the network."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            values = torch.rand(2, module.num_features, generator=generator, device="cpu")
            module.weight.data.copy_(0.5 + values[0])
            module.bias.data.copy_(values[1] - 0.5)
    return network


def run_training_step(network: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the logits and the gradients by name of one training step.

    Afterwards the running statistics of the batch norms are those of ``images``.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    logits = make_train_step(network.train(), images)()
    return logits, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def check_compiler() -> None:
    """Raise ConfigError unless `torch.compile` works on this machine."""

    def add_one(x: Tensor) -> Tensor:
        return x.relu() + 1

    try:
        torch.compile(add_one)(torch.ones(8))
    except Exception as error:  # the compiler raises errors of many classes
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"torch.compile does not work here ({why}); use --no-compile") from None


def check_compiled(
    eager: dict[str, nn.Module], compiled: dict[str, nn.Module], images: Tensor, say: Callable[[str], None]
) -> tuple[list[CheckRow], dict[str, float]]:
    """Compile the networks for ``images``, in inference and training, and check them against the eager ones.

    Returns:
        The checks, and the seconds that compiling took, by variant.

    Raises:
        ConfigError: an error is too large.
    """
    found: list[CheckRow] = []
    seconds: dict[str, float] = {}
    for name, network in compiled.items():
        # The networks share a class, and after the default limit PyTorch runs later ones eagerly without a warning.
        with torch._dynamo.config.patch(recompile_limit=256):  # pyright: ignore[reportPrivateUsage,reportUnknownMemberType]
            checks, seconds[name] = _check_one_compiled(name, network, eager[name.removesuffix(" compiled")], images)
        found += checks
        say(f"{name}: compiled for batch {len(images)} in {seconds[name]:.0f} s")
    return found, seconds


def _check_one_compiled(
    name: str, compiled: nn.Module, network: nn.Module, images: Tensor
) -> tuple[list[CheckRow], float]:
    allowed, allowed_gradient = COMPILED_ALLOWED[images.device.type]
    network.eval()
    expected = make_eval_step(network, images)()
    started = time.perf_counter()
    logits = make_eval_step(compiled, images)()
    seconds = time.perf_counter() - started
    error = measure_relative_error(logits, expected)
    found = [check_error(f"{name}: logits, batch {len(images)}", error, allowed)]
    if any(p.requires_grad for p in network.parameters()):  # false for the copies that are optimized for inference
        network.train()
        expected = compute_gradients(network, network, images)
        chaos = measure_relative_error([compute_gradients(network, network, perturb_last_digit(images))], [expected])
        started = time.perf_counter()
        gradients = compute_gradients(compiled, network, images)
        seconds += time.perf_counter() - started
        error = measure_relative_error([gradients], [expected])
        allowed_gradient = max(allowed_gradient, 4 * chaos)
        found.append(check_error(f"{name}: gradients, batch {len(images)}", error, allowed_gradient))
    return found, seconds


def perturb_last_digit(images: Tensor) -> Tensor:
    """Return ``images`` with each number changed by about one rounding error."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, images.shape, generator=generator, device="cpu").to(images) - 1
    return images * (1 + torch.finfo(images.dtype).eps * signs)


def compute_gradients(runner: nn.Module, network: nn.Module, images: Tensor) -> Tensor:
    """Return the gradients of ``network`` as one vector, after a forward and a backward of ``runner``.

    ``runner`` is the network itself or its compiled form, which shares the parameters. No optimizer step is made, and
    the gradients are cleared afterwards.
    """
    make_train_step(runner, images)()
    found = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    clear_gradients(network)
    return found
