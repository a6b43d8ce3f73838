"""The Triton kernels show on a device that they are right before networks use them there by themselves.

Once a process, device and dtype, value and every gradient of small tails are held to the float64 reference, in both
memory layouts, by the bound of the tests: twice the error of the reference in the same dtype, and the roundings of a
sum in another order.
"""

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.ops import reference, tail
from ecanet.ops.passes import Passes
from ecanet.ops.reference import Activation
from ecanet.testing import find_excess

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which the kernels are proven; in others networks do not use them by themselves."""

SHAPES = ((2, 72, 19, 29), (3, 5, 7, 3))
"""Several tiles and parts in both directions, and less than one; multiples of nothing."""

FORMATS = (torch.contiguous_format, torch.channels_last)

Kernels = Literal["fused", "expansion"]
"""Those of a block's tail, and that of its last convolution (`expansion`): each has a proof of its own."""

_passed: dict[tuple[Kernels, torch.device, torch.dtype], bool] = {}
_lock = threading.RLock()


class Case(NamedTuple):
    """A tail as networks have it; without a norm it is a gate alone."""

    shortcut: str | None
    activation: Activation
    gated: bool
    training: bool
    second_output: bool = False
    normed: bool = True


CASES = (
    Case("plain", "relu", True, True, True),
    Case("plain", "relu", False, True),
    Case("plain", "relu", True, False),
    Case("normed", "relu", True, True),
    Case(None, "relu", False, True),
    Case(None, "relu6", False, False),
    Case(None, None, True, True),
    Case(None, None, True, True, normed=False),
)


class Inputs(NamedTuple):
    """What the cases work on, in one dtype and layout; ``ways`` are the gradients that come back on two ways."""

    z: Tensor  # N C H W
    shortcut: Tensor  # N C H W
    ways: tuple[Tensor, Tensor]
    norm: nn.BatchNorm2d
    slopes: Tensor  # C, of the gate


def is_proven(device: torch.device, dtype: torch.dtype, kernels: Kernels = "fused") -> bool:
    """Whether the kernels are right on ``device``: tried at the first question, and if not, warned of once."""
    key = kernels, device, dtype
    if key not in _passed:
        with _lock:
            if key not in _passed:
                if capturing(device):
                    warn(device, "a CUDA graph is captured before they could be tried; run one step before", kernels)
                    return False
                failed = find_failure(device, dtype) if kernels == "fused" else find_expansion_failure(device, dtype)
                if failed is not None:
                    warn(device, failed, kernels)
                _passed[key] = failed is None
    return _passed[key]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, which a comparison of results would break."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn(device: torch.device, why: str, kernels: Kernels = "fused") -> None:
    """Say that the kernels are not used."""
    instead = "The lean passes run" if kernels == "fused" else "PyTorch's convolution and the lean passes run"
    warnings.warn(
        f"ecanet's {kernels} kernels are not used on {device}: {why}. {instead} instead: the same results with "
        "more passes over memory. Please report it to the project with the output of `python -m "
        "torch.utils.collect_env`; ops.prefer_impl('lean') chooses the lean passes without trying",
        stacklevel=2,
    )


def find_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels of a tail on ``device`` in ``dtype``; None if nothing is."""
    return attempt(_tails, device, dtype)


def find_expansion_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernel of a last convolution on ``device`` in ``dtype``; None if nothing is."""
    return attempt(_expansion, device, dtype)


def attempt(
    trial: Callable[[torch.device, torch.dtype], str | None], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What ``trial`` finds, and what keeps it from running."""
    try:
        with undisturbed(device):
            return trial(device, dtype)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # of Triton's compiler or the driver, in classes of their own
        line = next(iter(str(error).strip().splitlines()), "no message")
        return f"they do not run in {dtype} ({type(error).__name__}: {line})"


def _tails(device: torch.device, dtype: torch.dtype) -> str | None:
    from ecanet.ops.triton import launch as fused

    for shape in SHAPES:
        for layout in FORMATS:
            for case in CASES:
                wrong = find_discrepancy(case, inputs(shape, layout, device, dtype), fused)  # pyright: ignore
                if wrong is not None:
                    return f"{wrong} ({case}, {shape}, {dtype}, {layout})"
    return None


def _expansion(device: torch.device, dtype: torch.dtype) -> str | None:
    from ecanet.ops.triton import expansion

    return expansion.find_discrepancy(device, dtype)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the caller's forward runs under (no gradients, autocast, hooks on saved tensors) does not reach in."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on as well
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x))
        yield


def inputs(shape: tuple[int, ...], layout: torch.memory_format, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random numbers from a generator of their own."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    z, shortcut, first, second = (
        x.to(device, dtype).contiguous(memory_format=layout)
        for x in (2 * draw(*shape) + 3, *(draw(*shape) for _ in range(3)))
    )
    norm = nn.BatchNorm2d(shape[1], dtype=torch.float32, device=device)
    with torch.no_grad():
        for values, moved in ((norm.weight, 1.5), (norm.bias, 0.5), (norm.running_mean, 3.0), (norm.running_var, 4.0)):
            assert values is not None
            values.copy_(moved + draw(shape[1]).clamp(-1, 1))
    return Inputs(z, shortcut, (first, second), norm, draw(shape[1]).to(device, torch.float32))


def find_discrepancy(case: Case, given: Inputs, passes: Passes) -> str | None:
    """Which result is farther from float64 than it may be; None if none is."""
    given = without_ties(case, given)
    found, plain, exact = results(case, given, passes), results(case, given, None), results(case, wide(given), None)
    largest = max(float(way.abs().max()) for way in given.ways)  # a sum of such terms can be small, its error is not
    for name, value in exact.items():
        roundings = 4 * math.sqrt(max(1, given.z.numel() // max(1, value.numel())))
        excess = find_excess(name, found[name], plain[name], value, roundings=roundings, magnitude=largest)
        if excess is not None:
            return excess
    return None


def results(case: Case, given: Inputs, passes: Passes | None) -> dict[str, Tensor]:
    """Output, gradients and running statistics by name; the reference's where ``passes`` is None."""
    norm, side = (copy.deepcopy(given.norm).train(case.training) for _ in range(2))
    leaves = {"dz": given.z, "dshortcut": given.shortcut, "dslopes": given.slopes}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    z, shortcut, slopes = leaves.values()

    def gate(p: Tensor) -> Tensor:
        return torch.sigmoid(slopes * p)

    arguments = (
        z, norm, gate if case.gated else None, shortcut if case.shortcut else None,
        side if case.shortcut == "normed" else None, case.activation,
    )  # fmt: skip
    if not case.normed:
        outputs = (reference.squeeze_scale(z, gate) if passes is None else tail.squeeze_scale(z, gate, passes),) * 2
    elif passes is None:
        outputs = (reference.residual_tail(*arguments),) * 2
    else:
        outputs = tail.residual_tail(*arguments, passes, case.second_output)
    leaves |= {f"d{name}": p for name, p in norm.named_parameters()}
    leaves |= {f"dside.{name}": p for name, p in side.named_parameters()}
    count = 2 if case.second_output else 1
    gradients = torch.autograd.grad(outputs[:count], list(leaves.values()), given.ways[:count], allow_unused=True)
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"y": outputs[0].detach(), **found, **{n: b for n, b in norm.named_buffers() if b.is_floating_point()}}


def wide(given: Inputs) -> Inputs:
    """The same numbers in float64."""
    first, second = (way.double() for way in given.ways)
    norm = copy.deepcopy(given.norm).double()
    return Inputs(given.z.double(), given.shortcut.double(), (first, second), norm, given.slopes.double())


def without_ties(case: Case, given: Inputs) -> Inputs:
    """No gradient comes back where rounding decides whether the activation passes it."""
    y = results(case._replace(activation=None), wide(given), None)["y"]
    width = torch.finfo(given.z.dtype).eps ** 0.5
    near = (y.abs() < width) | ((y - 6).abs() < width)
    first, second = (way.masked_fill(near, 0) for way in given.ways)
    return given._replace(ways=(first, second))
