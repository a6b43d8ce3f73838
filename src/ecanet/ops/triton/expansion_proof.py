"""The cases of `expansion` and `predicted_gates` that `ops.proof` checks on a device before networks use them there."""

from typing import NamedTuple

import torch
from torch import Tensor

from ecanet.ops.channel_gates import ChannelGate, compute_weights, sum_taps
from ecanet.ops.reference import Activation
from ecanet.ops.triton import expansion, predicted_gates
from ecanet.ops.triton.expansion import INTERPRETED
from ecanet.testing import bound_sums, find_elementwise_excess

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""h, weight, bias, gate, shortcut and offset."""


class Case(NamedTuple):
    """Which operands the equation has, and the activation."""

    biased: bool
    gated: bool
    added: bool
    activation: Activation
    offset: bool = False


USUAL = (Case(True, True, True, "relu"), Case(True, False, True, "relu"))

TRIED = {
    (3, 19, 37, 5, 3): (*USUAL, Case(True, True, False, "relu6"), Case(False, False, True, None, True)),
    (2, 64, 208, 14, 14): (*USUAL, Case(True, True, True, "relu", True)),
    (3, 128, 96, 7, 7): USUAL[:1],
    (3, 144, 208, 93, 61): USUAL,
}
"""Cases by (N, K, C, H, W): sizes that are no multiples of a tile; then channels as in networks, with both tiles."""


GATES = {
    (3, 37, 70): ("shared", "own", "circular"),
    (70, 130, 208): ("shared",),
}
"""Kinds of taps by (N, K, C): less than one tile and more, with several programs of channels."""


def find_discrepancy(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how the kernels are wrong on ``device``, None if they are not."""
    for size, kinds in GATES.items():
        for kind in kinds:
            excess = find_gate_excess(size, kind, device, dtype)
            if excess is not None:
                return f"{excess} ({kind} taps, {size}, {dtype})"
    for shape, cases in TRIED.items():
        for case in cases:
            *given, offset = make_inputs(shape, case, device, dtype)
            y = expansion.run_expansion(*given, case.activation, offset)
            expected, allowed = compute_exactly(*given, case.activation, offset)
            excess = find_elementwise_excess("y", y, expected, allowed)
            if excess is not None:
                return f"{excess} ({case}, {shape}, {dtype})"
    return None


def find_gate_excess(size: tuple[int, int, int], kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return by how much a gate of random numbers is wrong, None if it is not."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    (samples, inner, channels), own = size, kind == "own"
    m, weight, bias = draw(samples, inner), (draw(channels, inner) / inner**0.5).to(dtype), draw(channels).to(dtype)
    taps, gate_bias = (draw(channels, 5) if own else draw(5)).to(dtype), draw(1).to(dtype)
    form = ChannelGate(taps, gate_bias, 5, own, circular=kind == "circular", gain=2.0)
    g = predicted_gates.predict_gate(m, weight, bias, form)
    return find_elementwise_excess("g", g, *compute_gate_exactly(m, weight, bias, form))


def compute_gate_exactly(m: Tensor, weight: Tensor, bias: Tensor | None, form: ChannelGate) -> tuple[Tensor, Tensor]:
    """Return the factors in float64, and how far from them a result may be that is computed in float32.

    Three products of TF32 lose up to 24 eps of the absolute values summed, each of the K sums one, the taps one each.
    A sigmoid has a slope of at most 1/4, and its own operations lose a few eps.
    """
    w = weight.flatten(1).double()
    p, terms = m.double() @ w.t(), m.double().abs() @ w.abs().t()
    if bias is not None:
        p, terms = p + bias.double(), terms + bias.double().abs()
    taps, gate_bias = (None if x is None else x.abs() for x in (form.weight, form.bias))
    sizes = form._replace(weight=taps, bias=gate_bias)
    roundings = m.shape[1] + 24 + form.taps + 2
    eps = torch.finfo(torch.float32).eps
    return compute_weights(p, form), form.gain * eps * (roundings * sum_taps(terms, sizes) / 4 + 4)


def make_inputs(shape: tuple[int, ...], case: Case, device: torch.device, dtype: torch.dtype) -> Operands:
    """Return random h, weight, bias, gate, shortcut and offset, None for those that the case has not.

    They come from a generator of their own, so that the global random state is unchanged.
    """
    n, inner, channels, *plane = shape
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*size: int, wide: bool = False) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        last = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return x.to(device, torch.float32 if wide else dtype).contiguous(memory_format=last)

    h, weight, bias = draw(n, inner, *plane), draw(channels, inner), draw(channels)
    gate, shortcut = draw(n, channels, wide=True).sigmoid(), draw(n, channels, *plane)
    return (
        h, weight, bias if case.biased else None, gate if case.gated else None, shortcut if case.added else None,
        draw(channels) if case.offset else None,
    )  # fmt: skip


def compute_exactly(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None,
    activation: Activation, offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the result in float64, and how far from it a result may be that is summed in float32 and rounded once.

    Each of the K products, and bias, gate, shortcut and offset, may lose an eps of the absolute values summed.
    """
    x, w = h.movedim(1, -1).double(), weight.double()
    y, terms = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        y, terms = y + bias.double(), terms + bias.double().abs()
    if gate is not None:
        scale = gate.double()[:, None, None]
        y, terms = y * scale, terms * scale.abs()
    if shortcut is not None:
        addend = shortcut.movedim(1, -1).double()
        y, terms = y + addend, terms + addend.abs()
    if offset is not None:
        y, terms = y + offset.double(), terms + offset.double().abs()
    y = y if activation is None else y.clamp(0, 6 if activation == "relu6" else None)
    truncates = INTERPRETED and h.dtype == torch.bfloat16  # the interpreter does not round to bfloat16, it truncates
    allowed = bound_sums(y, terms, h.shape[1] + 4, h.dtype, truncates=truncates)
    return y.movedim(-1, 1), allowed.movedim(-1, 1)
