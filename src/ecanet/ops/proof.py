"""Check the Triton kernels on a device before networks use them there without being told to.

Once for each machine, device and dtype (see `proof_records`), the value and every gradient of small tails are compared
with the float64 reference, in both memory layouts. The bound is that of the tests (`ecanet.testing.find_excess`):
twice the error of the reference in the same dtype, and the roundings of a sum in another order.
"""

import copy
import math
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ecanet.ops import proof_records, reference, tail
from ecanet.ops.channel_gates import ChannelGate, compute_weights
from ecanet.ops.passes import Passes
from ecanet.ops.reference import Activation
from ecanet.testing import find_excess

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which the kernels are checked. In others networks use them only on request."""

SHAPES = ((2, 72, 19, 29), (3, 5, 7, 3))
"""(N, C, H, W): several tiles and parts in both directions, and less than one tile; no size is a multiple of a tile."""

FORMATS = (torch.contiguous_format, torch.channels_last)

Kernels = Literal["fused", "operators", "expansion"]
"""The kernels of a block's tail, the same as operators in a compiled graph, and the kernel of its last convolution.

Each has its own proof.
"""

_passed: dict[tuple[Kernels, torch.device, torch.dtype], bool] = {}
_lock = threading.RLock()


class Case(NamedTuple):
    """A tail as networks have it; without ``normed`` it is a gate alone."""

    shortcut: Literal["plain", "normed"] | None
    activation: Activation
    gate: Literal["shared taps", "own taps", "function"] | None
    """The first two are computed in a kernel, a function in PyTorch."""
    training: bool
    second_output: bool = False
    normed: bool = True


CASES = (
    Case("plain", "relu", "shared taps", True, True),
    Case("plain", "relu", None, True),
    Case("plain", "relu", "own taps", False),
    Case("normed", "relu", "own taps", True),
    Case(None, "relu", None, True),
    Case(None, "relu6", None, False),
    Case(None, None, "shared taps", True),
    Case("normed", "relu", "function", True),
    Case(None, None, "function", True, normed=False),
)


class _TapsGate:
    """A gate of the form that the kernels compute."""

    def __init__(self, form: ChannelGate):
        self.form = form

    def weigh(self, p: Tensor) -> Tensor:
        """Return the weights (N, C) for channel means ``p``."""
        return compute_weights(p, self.form)

    def describe_gate(self) -> ChannelGate:
        """Return the form."""
        return self.form


class Inputs(NamedTuple):
    """The inputs of a case in one dtype and layout."""

    z: Tensor  # N C H W
    shortcut: Tensor  # N C H W
    dy: tuple[Tensor, Tensor]  # N C H W each, for the first and the second output
    norm: nn.BatchNorm2d
    slopes: Tensor  # C, of the gate


def is_proven(device: torch.device, dtype: torch.dtype, kernels: Kernels = "fused") -> bool:
    """Return whether the kernels are right on ``device``. The first call checks them, and warns if they are not."""
    key = kernels, device, dtype
    if key not in _passed:
        with _lock:
            if key not in _passed:  # another thread may have checked while this one waited
                if is_capturing(device):
                    reason = "a CUDA graph is captured before they could be checked; run one step before the capture"
                    warn_unused(device, reason, kernels)
                    return False
                _passed[key] = proof_records.has_passed(device, dtype, kernels) or try_kernels(device, dtype, kernels)
    return _passed[key]


def try_kernels(device: torch.device, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Return whether the kernels are right. A success is recorded for later processes, a failure warned of."""
    failed = find_expansion_failure(device, dtype) if kernels == "expansion" else find_failure(device, dtype)
    if failed is not None:
        warn_unused(device, failed, kernels)
        return False
    proof_records.record_success(device, dtype, kernels)
    return True


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured. To compare results would end the capture with an error."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_unused(device: torch.device, reason: str, kernels: Kernels = "fused") -> None:
    """Warn that the kernels are not used on ``device``."""
    instead = {
        "fused": "The lean passes run",
        "operators": "PyTorch's operations run",
        "expansion": "PyTorch's convolution and the lean passes run",
    }[kernels]
    warnings.warn(
        f"ecanet's {kernels} kernels are not used on {device}: {reason}. {instead} instead, with the same results "
        "in more passes over memory. Please report this to the project with the output of `python -m "
        "torch.utils.collect_env`. To use the lean passes without this check, call ops.prefer_impl('lean')",
        stacklevel=2,
    )


def find_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the kernels of a tail on ``device`` in ``dtype``, None if nothing is."""
    return run_trial(_try_tails, device, dtype)


def find_expansion_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the kernel of a last convolution on ``device`` in ``dtype``, None if nothing is."""
    return run_trial(_try_expansion, device, dtype)


def run_trial(
    trial: Callable[[torch.device, torch.dtype], str | None], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return what ``trial`` finds, or the error that keeps it from running."""
    try:
        with isolate(device):
            return trial(device, dtype)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # Triton's compiler and the driver have exceptions of their own
        line = next(iter(str(error).strip().splitlines()), "no message")
        return f"they do not run in {dtype} ({type(error).__name__}: {line})"


def _try_tails(device: torch.device, dtype: torch.dtype) -> str | None:
    from ecanet.ops.triton import launch as fused

    for shape in SHAPES:
        for layout in FORMATS:
            for case in CASES:
                excess = find_discrepancy(case, make_inputs(shape, layout, device, dtype), fused)  # pyright: ignore[reportArgumentType]
                if excess is not None:
                    return f"{excess} ({case}, {shape}, {dtype}, {layout})"
    return None


def _try_expansion(device: torch.device, dtype: torch.dtype) -> str | None:
    from ecanet.ops.triton import expansion_proof

    return expansion_proof.find_discrepancy(device, dtype)


@contextmanager
def isolate(device: torch.device) -> Generator[None, None, None]:
    """Shield the proof from the state of the forward that asks for it: no_grad, autocast, hooks on saved tensors."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # this also turns gradients on
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x))
        yield


def make_inputs(
    shape: tuple[int, ...], layout: torch.memory_format, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Return random inputs. They come from a generator of their own, so that the global random state is unchanged."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    z, shortcut, first, second = (
        x.to(device, dtype).contiguous(memory_format=layout)
        for x in (2 * draw(*shape) + 3, *(draw(*shape) for _ in range(3)))
    )
    norm = nn.BatchNorm2d(shape[1], dtype=torch.float32, device=device)
    with torch.no_grad():
        for values, centre in ((norm.weight, 1.5), (norm.bias, 0.5), (norm.running_mean, 3.0), (norm.running_var, 4.0)):
            assert values is not None
            values.copy_(centre + draw(shape[1]).clamp(-1, 1))
    return Inputs(z, shortcut, (first, second), norm, draw(shape[1]).to(device, torch.float32))


def find_discrepancy(case: Case, inputs: Inputs, passes: Passes) -> str | None:
    """Return the first result that is farther from float64 than rounding explains, None if there is none."""
    inputs = drop_ties(case, inputs)
    actual, plain = compute_results(case, inputs, passes), compute_results(case, inputs, None)
    exact = compute_results(case, convert_to_float64(inputs), None)
    largest = max(float(dy.abs().max()) for dy in inputs.dy)  # a sum of such terms may be small, its error is not
    for name, value in exact.items():
        roundings = 4 * math.sqrt(max(1, inputs.z.numel() // max(1, value.numel())))
        excess = find_excess(name, actual[name], plain[name], value, roundings=roundings, magnitude=largest)
        if excess is not None:
            return excess
    return None


def compute_results(case: Case, inputs: Inputs, passes: Passes | None) -> dict[str, Tensor]:
    """Return output, gradients and running statistics by name; those of the reference if ``passes`` is None."""
    norm, shortcut_norm = (copy.deepcopy(inputs.norm).train(case.training) for _ in range(2))
    leaves = {"dz": inputs.z, "dshortcut": inputs.shortcut, "dslopes": inputs.slopes}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    z, shortcut, slopes = leaves.values()

    def function(p: Tensor) -> Tensor:
        return torch.sigmoid(slopes * p)

    gate = {
        None: None,
        "function": function,
        "own taps": _TapsGate(ChannelGate(slopes, own_taps=True)).weigh,
        "shared taps": _TapsGate(ChannelGate(slopes[:3], taps=3)).weigh,
    }[case.gate]
    arguments = (
        z, norm, gate, shortcut if case.shortcut else None,
        shortcut_norm if case.shortcut == "normed" else None, case.activation,
    )  # fmt: skip
    if not case.normed:
        only = reference.squeeze_scale(z, function) if passes is None else tail.squeeze_scale(z, function, passes)
        outputs = only, only
    elif passes is None:
        outputs = (reference.residual_tail(*arguments),) * 2
    else:
        outputs = tail.residual_tail(*arguments, passes, case.second_output)
    leaves |= {f"d{name}": p for name, p in norm.named_parameters()}
    leaves |= {f"dshortcut_norm.{name}": p for name, p in shortcut_norm.named_parameters()}
    count = 2 if case.second_output else 1
    found = torch.autograd.grad(outputs[:count], list(leaves.values()), inputs.dy[:count], allow_unused=True)
    gradients = cast(tuple[Tensor | None, ...], found)  # None for leaves that the case does not use
    results = {"y": outputs[0].detach()}
    results |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return results | {name: b for name, b in norm.named_buffers() if b.is_floating_point()}


def convert_to_float64(inputs: Inputs) -> Inputs:
    """Return the same numbers in float64."""
    first, second = (dy.double() for dy in inputs.dy)
    norm = copy.deepcopy(inputs.norm).double()
    return Inputs(inputs.z.double(), inputs.shortcut.double(), (first, second), norm, inputs.slopes.double())


def drop_ties(case: Case, inputs: Inputs) -> Inputs:
    """Return ``inputs`` with dy set to 0 where rounding decides whether the activation passes it.

    There two right implementations may differ by all of dy, which no bound on roundings allows.
    """
    y = compute_results(case._replace(activation=None), convert_to_float64(inputs), None)["y"]
    width = torch.finfo(inputs.z.dtype).eps ** 0.5
    near = (y.abs() < width) | ((y - 6).abs() < width)
    first, second = (dy.masked_fill(near, 0) for dy in inputs.dy)
    return inputs._replace(dy=(first, second))
