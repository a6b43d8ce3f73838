"""Fold norms into the convolutions before them. What computes ``a x + b`` for each channel is a norm."""

import copy
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from ecanet.ops import has_original_forward, must_be_called
from ecanet.surgery import own_tensors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

LARGE = 2.0**20
"""The slope is measured between -LARGE and LARGE, where the offset does not take digits from it."""


class Affine(NamedTuple):
    """``y = slope x + offset``, both (C,) in float64 on the CPU."""

    slope: Tensor
    offset: Tensor


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Return whether a norm may be folded into ``module``: a convolution with a weight of its own and without hooks.

    A weight that is computed (by a parametrization, by weight norm) is no parameter of the convolution, or a hook makes
    it. A quantized convolution is of another class.
    """
    if not isinstance(module, CONVOLUTIONS) or must_be_called(module):
        return False
    spread = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) and module.groups > 1
    return "weight" in vars(module)["_parameters"] and module.weight.is_floating_point() and not spread


def measure_affine(module: nn.Module, channels: int, axes: int) -> Affine | None:
    """Return the map that ``module`` computes in evaluation, without its children; None if it is not affine.

    A copy runs in float64 on numbers of many sizes in planes (N, ``channels``, ...) of ``axes`` axes. Batch norms with
    running statistics, frozen ones and layer scale are affine. Group norm, layer norm and activations are not.
    """
    if not any(len(tensor) == channels for tensor in own_tensors(module) if tensor.dim()):
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=torch.float64, device="cpu").reshape(-1, *(1,) * (axes + 1))
    x = sizes * torch.randn(4, channels, *(3,) * axes, generator=generator, dtype=torch.float64, device="cpu")
    point = torch.ones(1, channels, *(3,) * axes, dtype=torch.float64, device="cpu")
    try:
        probe = copy.deepcopy(module).cpu().double().eval()
        for name, _ in module.named_children():
            probe.register_module(name, nn.Identity())
        with torch.no_grad():
            y, offset, high, low = (probe(one.clone()) for one in (x, 0 * point, LARGE * point, -LARGE * point))
    except Exception:  # a forward may raise anything for planes of another size
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    start = (0, slice(None), *(0,) * axes)
    found = Affine((high[start] - low[start]) / (2 * LARGE), offset[start])
    slope, offset = (one.reshape(-1, *(1,) * axes) for one in found)
    # the product, the sum and what the slope was computed from are rounded: a few eps of the terms
    allowed = 16 * torch.finfo(torch.float64).eps * ((slope * x).abs() + offset.abs())
    return found if bool(((y - (slope * x + offset)).abs() <= allowed).all()) else None


@torch.no_grad()
def fold(convolution: Convolution, norm: Affine) -> Convolution:
    """Return a copy of ``convolution`` with ``norm`` in weight and bias, computed in float64 and rounded once."""
    folded = copy.copy(convolution)
    vars(folded)["_parameters"] = dict(vars(convolution)["_parameters"])
    weight = convolution.weight
    slope, offset = (one.to(weight.device) if weight.device.type != "mps" else one for one in norm)
    across = isinstance(convolution, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    shape = (1, -1) if across else (-1, 1)
    wide = weight.to(slope.device).double() * slope.reshape(*shape, *(1,) * (weight.dim() - 2))
    bias = offset if convolution.bias is None else slope * convolution.bias.to(slope.device).double() + offset
    folded.weight = nn.Parameter(wide.to(weight.device, weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)
    return folded


def folds(convolution: Convolution, norm: Affine) -> bool:
    """Return whether `fold` gives what the two give one after the other.

    It does for the layers of PyTorch. A subclass may do more with its weight, so it is tried in float64.
    """
    if type(convolution) in CONVOLUTIONS and has_original_forward(convolution):
        return True
    axes = len(convolution.kernel_size)
    shape = (1, convolution.in_channels, *(2 * side + 1 for side in convolution.kernel_size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    try:
        wide = copy.deepcopy(convolution).cpu().double().eval()
        with torch.no_grad():
            plain, actual = cast(Tensor, wide(x.clone())), cast(Tensor, fold(wide, norm)(x))
    except Exception:  # a forward may raise anything
        return False
    slope, offset = (one.reshape(-1, *(1,) * axes) for one in norm)
    expected = plain * slope + offset
    terms = (convolution.weight.detach().abs().sum() * x.abs().max()).cpu().double() * slope.abs() + offset.abs()
    return actual.shape == expected.shape and bool(((actual - expected).abs() <= 1e-12 * (1 + terms)).all())
