"""Write a gate in the operations that a runtime executes fast: the one table of gate forms.

Every form computes ``x * gain * gate(mean(x))`` from the same weights. They differ in the operations between the means
and the sigmoid, and in nothing else, so that a target names its form and no module knows the targets.
"""

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ecanet.attention import ESE, SE, SEGC, ChannelAttention, SEVar3
from ecanet.deploy.cbam_form import ExportedCBAM, is_own_cbam
from ecanet.ops import ChannelGate

__all__ = ["FORMS", "ExportedGate", "Form", "build_gate", "make_band"]

Form = Literal["conv1d", "conv2d", "mixed", "banded", "matrix"]
Layer = TypeVar("Layer", nn.Conv1d, nn.Conv2d, nn.Linear)


class Conv1dForm(nn.Module):
    """A 1-D convolution over the channels: (N, C, 1, 1) -> (N, C, 1, 1)."""

    def __init__(self, gate: ChannelGate, channels: int):
        super().__init__()
        k = gate.taps
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=gate.bias is not None)
        fill(self.conv, read(gate.weight, k).reshape(1, 1, k), gate.bias)

    def forward(self, p: Tensor) -> Tensor:
        """Return the sums over neighbouring channels."""
        return self.conv(p.squeeze(-1).transpose(1, 2)).transpose(1, 2)[..., None]


class Conv2dForm(nn.Module):
    """A 2-D convolution with a 1 x k kernel over the channels, which a permutation makes the width."""

    def __init__(self, gate: ChannelGate, channels: int):
        super().__init__()
        k = gate.taps
        self.conv = nn.Conv2d(1, 1, (1, k), padding=(0, k // 2), bias=gate.bias is not None)
        fill(self.conv, read(gate.weight, k).reshape(1, 1, 1, k), gate.bias)

    def forward(self, p: Tensor) -> Tensor:
        """Return the sums over neighbouring channels."""
        return self.conv(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # N 1 1 C and back


class BandedForm(nn.Sequential):
    """A 1 x 1 convolution whose C x C weights are zero away from the diagonal: no step but a convolution."""

    def __init__(self, gate: ChannelGate, channels: int):
        conv = nn.Conv2d(channels, channels, 1, bias=gate.bias is not None)
        bias = None if gate.bias is None else gate.bias.expand(channels)
        super().__init__(fill(conv, make_band(gate, channels)[..., None, None], bias))


class MatrixForm(nn.Module):
    """A product of the means with the same C x C matrix."""

    def __init__(self, gate: ChannelGate, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels, bias=gate.bias is not None)
        fill(self.linear, make_band(gate, channels), None if gate.bias is None else gate.bias.expand(channels))

    def forward(self, p: Tensor) -> Tensor:
        """Return the sums over neighbouring channels."""
        return self.linear(p.flatten(1))[..., None, None]


class PointwiseForm(nn.Module):
    """One weight for each channel, and no neighbours."""

    def __init__(self, gate: ChannelGate, channels: int):
        super().__init__()
        self.register_buffer("weight", read(gate.weight, channels).reshape(1, channels, 1, 1))

    def forward(self, p: Tensor) -> Tensor:
        """Return ``weight * p``."""
        return p * self.get_buffer("weight")


class ConstantForm(nn.Module):
    """Weights that do not depend on the means, as ASR's: recorders leave the means out."""

    def __init__(self, factors: Tensor):
        super().__init__()
        self.register_buffer("factors", factors.detach()[..., None, None].clone())

    def forward(self, p: Tensor) -> Tensor:
        """Return the factors (1, C, 1, 1)."""
        return self.get_buffer("factors")


MOST_BANDED = 320
"""Most channels of a gate that "mixed" writes as a matrix: the widest for which it was measured, with 0.4 MB."""


def build_mixed(gate: ChannelGate, channels: int) -> nn.Module:
    """Return the banded form of a narrow gate, and the 2-D convolution of a wide one."""
    return BandedForm(gate, channels) if channels <= MOST_BANDED else Conv2dForm(gate, channels)


FORMS: dict[Form, Callable[[ChannelGate, int], nn.Module]] = {
    "conv1d": Conv1dForm,
    "conv2d": Conv2dForm,
    "mixed": build_mixed,
    "banded": BandedForm,
    "matrix": MatrixForm,
}
"""The forms of a kernel that all channels share. Other gates have one form each: see `build_layers`."""


class ExportedGate(nn.Module):
    """``x * gain * activation(layers(mean(x)))``, with the means as (N, C, 1, 1) and nothing that depends on sizes."""

    def __init__(self, layers: nn.Module, activation: nn.Module, gain: float):
        super().__init__()
        self.layers, self.activation, self.gain = layers, activation, gain

    def weigh(self, p: Tensor) -> Tensor:
        """Return the factors (N, C, 1, 1) for channel means ``p`` (N, C, 1, 1)."""
        g = self.activation(self.layers(p))
        return g if self.gain == 1 else self.gain * g

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (N, C, ...) times the factor of each channel."""
        if x.dim() == 4:
            return x * self.weigh(x.mean((2, 3), keepdim=True))
        axes = tuple(range(2, x.dim()))
        g = self.weigh((x.mean(axes) if axes else x)[..., None, None]).flatten(1)
        return x * g.reshape(*g.shape, *(1 for _ in axes))


def build_gate(attention: nn.Module, form: Form) -> ExportedGate | ExportedCBAM | None:
    """Return ``attention`` in the form ``form``; None if it has no such form, so that it is exported as it is.

    CBAM has one form. The other attentions that are not squeeze, gate, scale (GC, …) have none, nor has a class of a
    user's own, or a gate whose weights are computed by a hook, as pruning does.
    """
    if any(vars(m)["_forward_pre_hooks"] or vars(m)["_forward_hooks"] for m in attention.modules()):
        return None
    if is_own_cbam(attention):
        return ExportedCBAM(attention).eval().requires_grad_(False)
    if not isinstance(attention, ChannelAttention) or type(attention).forward is not ChannelAttention.forward:
        return None
    found = build_layers(attention, form)
    return None if found is None else ExportedGate(*found, attention.gain).eval().requires_grad_(False)


def build_layers(attention: ChannelAttention, form: Form) -> tuple[nn.Module, nn.Module] | None:
    """Return the layers from means to the activation, on (N, C, 1, 1), and the activation."""
    if not attention.reads_means and attention.computes_gate_of(type(attention)):
        return ConstantForm(attention.gate(torch.ones(1, attention.channels))), nn.Identity()
    gate = attention.describe_gate()
    if gate is not None:
        return choose_layers(gate, attention.channels, form), nn.Sigmoid()
    dense = DENSE.get(type(attention))
    if dense is None or not attention.computes_gate_of(type(attention)):
        return None
    return dense(attention), nn.Hardsigmoid() if type(attention) is ESE else nn.Sigmoid()


def choose_layers(gate: ChannelGate, channels: int, form: Form) -> nn.Module:
    """Return the layers of a gate with few taps.

    Own weights for each channel, and neighbours around the end, have no short form but the matrix.
    """
    if gate.taps == 1 and gate.own_taps:
        return PointwiseForm(gate, channels)
    if gate.weight is None:
        return nn.Identity()
    if gate.own_taps or gate.circular:
        form = "matrix" if form == "matrix" else "banded"
    return FORMS[form](gate, channels)


@torch.no_grad()
def make_band(gate: ChannelGate, channels: int) -> Tensor:
    """Return the C x C matrix B with ``B[c, c + j - k // 2] = weight[c, j]``, for which the gate's sums are ``B p``.

    Neighbours that do not exist count as 0 or, if the gate is circular, are counted around the end.
    """
    k = gate.taps
    weight = read(gate.weight, k).reshape(-1, k).expand(channels, k)
    band = weight.new_zeros(channels, channels)
    rows = torch.arange(channels)
    for j in range(k):
        columns = rows + j - k // 2
        inside = torch.ones_like(rows, dtype=torch.bool) if gate.circular else (columns >= 0) & (columns < channels)
        # Added, not set: around the end of very few channels two taps may meet one neighbour.
        band[rows[inside], columns[inside] % channels] += weight[inside, j]
    return band


def build_se(attention: nn.Module) -> nn.Module:
    """Return SE's two layers as 1 x 1 convolutions with a ReLU between them."""
    se = cast(SE, attention)
    return nn.Sequential(make_pointwise(se.fc1), nn.ReLU(), make_pointwise(se.fc2))


def build_segc(attention: nn.Module) -> nn.Module:
    """Return SE-GC's block-diagonal matrix as one grouped 1 x 1 convolution."""
    weight = cast(SEGC, attention).weight.detach()  # G out in
    groups, width, _ = weight.shape
    conv = nn.Conv2d(groups * width, groups * width, 1, groups=groups, bias=False)
    return fill(conv, weight.reshape(groups * width, width, 1, 1), None)


DENSE: dict[type[ChannelAttention], Callable[[nn.Module], nn.Module]] = {
    SE: build_se,
    SEVar3: lambda gate: make_pointwise(cast(SEVar3, gate).fc),
    SEGC: build_segc,
    ESE: lambda gate: make_pointwise(cast(ESE, gate).fc),
}
"""Gates that are matrices: 1 x 1 convolutions of the means in every form."""


def make_pointwise(linear: nn.Linear) -> nn.Conv2d:
    """Return ``linear`` as a 1 x 1 convolution."""
    bias = cast("Tensor | None", linear.bias)
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=bias is not None)
    return fill(conv, linear.weight.detach()[..., None, None], bias)


@torch.no_grad()
def fill(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """Put copies of ``weight`` and ``bias`` into ``layer``, in their own dtype, and return it."""
    layer.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone().contiguous(), requires_grad=False)
    return layer


def read(weight: Tensor | None, size: int) -> Tensor:
    """Return the weight of a gate, or ``size`` ones for none."""
    return torch.ones(size) if weight is None else weight.detach()
