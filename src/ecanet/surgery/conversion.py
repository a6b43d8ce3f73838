"""Find the kernel of an ECA module, however it is written, and build this library's ECA with the very same numbers.

The copy of the module gets random parameters. If the sigmoid of a correlation with one of its tensors then gives its
factor, that tensor is the kernel; no other tensor gives it by chance.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ecanet import ops
from ecanet.attention import ECA
from ecanet.surgery.forms import TOLERANCE, Form, agree
from ecanet.surgery.modules import list_modules
from ecanet.surgery.probing import Operations, Probe

PADDINGS = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}
"""Padding modes of convolutions, and their names in F.pad. ECA has the first two."""

GATES = {
    "hardsigmoid": "hard sigmoid",
    "hardtanh": "clipped line",
    "relu6": "clipped line",
    "clamp": "clipped line",
    "softmax": "softmax",
    "tanh": "tanh",
}
"""Operations that stand in the place of the sigmoid, with their names in messages."""


@dataclass(frozen=True)
class Kernel:
    """Where the weights of an ECA module are."""

    weight: str
    """Name of the tensor: ``conv.weight``."""
    bias: str | None
    padding_mode: str
    size: int
    flipped: bool = False
    """True for a transposed convolution, which reads its kernel backwards."""
    computed: bool = False
    """True if it is no parameter but computed from parameters, as by weight norm."""


@dataclass(frozen=True)
class NoKernel:
    """Why a module is not converted to ECA."""

    reason: str
    is_eca: bool = False
    """True if it is an ECA of a kind that this library does not have."""


def find_kernel(probe: Probe) -> Kernel | NoKernel:
    """Return where the kernel of a channel attention is, or why it is not the paper's ECA."""
    assert probe.form is not None
    probe.draw(7)
    means = probe.noise((probe.shape[0], probe.shape[1]), 70).double()
    factors = [probe.read(sign * means, 0) for sign in (1, -1, 0)]
    operations = probe.operations
    plus, minus, zero = (means if factor is None else factor.double() for factor in factors)
    tensors = dict(list_tensors(probe.module))
    # Correlations are many and long: none is tried unless the logits are affine in the means, as only few modules' are.
    if is_affine(plus.logit(), minus.logit(), zero.logit()):
        kernels = list(match_kernels(means, plus.logit(), tensors))
        for kernel in sorted(kernels, key=lambda k: (k.size % 2 == 0, k.padding_mode not in ("zeros", "circular"))):
            if kernel.size % 2 == 0:
                return NoKernel(f"has a kernel of even size {kernel.size}; ECA's sizes are odd", is_eca=True)
            if kernel.padding_mode not in ("zeros", "circular"):
                return NoKernel(f"pads with {kernel.padding_mode!r}; ECA pads with 'zeros' or 'circular'", is_eca=True)
            computed = kernel.weight not in dict(probe.module.named_parameters())
            return dataclasses.replace(kernel, computed=computed)
        if has_kernel_per_channel(means, plus.logit(), tensors):
            return NoKernel("has one kernel for each channel (ECA-NS), not one for all")
        for dilation in (2, 3, 4):
            dilated = {name: dilate(t.flatten(), dilation) for name, t in tensors.items() if t.numel() > 1}
            if any(match_kernels(means, plus.logit(), dilated)):
                return NoKernel(f"has a dilated kernel (dilation {dilation})")
    residual = is_affine(*((factor - 1).logit() for factor in (plus, minus, zero)))
    if residual and any(match_kernels(means, (plus - 1).logit(), tensors)):
        return NoKernel("adds its input to the product: x + x * gate")
    return NoKernel(describe_difference(operations))


def is_affine(plus: Tensor, minus: Tensor, zero: Tensor) -> bool:
    """Return whether f(p), f(-p) and f(0) are those of an affine f."""
    size = plus.abs().max()
    return bool(size.isfinite() and (plus + minus - 2 * zero).abs().max() <= TOLERANCE * size)


def describe_difference(operations: Operations) -> str:
    """Return why a factor is not the sigmoid of a correlation with one kernel, as its operations show."""
    for name, gate in GATES.items():
        if any(name in operation for operation in operations.names):
            return f"has a {gate} in the place of the sigmoid"
    count = len(operations.convolved)
    return f"has {count} convolutions in a row" if count > 1 else "is not the sigmoid of one correlation over channels"


def list_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of all tensors of ``module``, those computed from parameters included.

    Weight norm as a parametrization computes ``weight`` when it is read; the old weight norm keeps it as an attribute.
    """
    for prefix, part in list_modules(module):
        if isinstance(part, parametrize.ParametrizationList):
            continue
        attributes = cast("dict[str, object]", vars(part))
        names = dict.fromkeys(name for name, value in attributes.items() if isinstance(value, Tensor))
        for kind in ("_parameters", "_buffers"):
            names |= dict.fromkeys(cast("dict[str, Tensor | None]", attributes[kind]))
        if parametrize.is_parametrized(part):
            names |= dict.fromkeys(name for name in cast("dict[str, object]", part.parametrizations))
        for name in names:
            value = getattr(part, name)
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{prefix}.{name}".lstrip("."), value.detach()


def match_kernels(means: Tensor, logits: Tensor, tensors: dict[str, Tensor]) -> Iterator[Kernel]:
    """Yield the ways to give ``logits`` (N, C) as a correlation of ``means`` with one of ``tensors``, plus a bias."""
    biases: list[str | None] = [None, *(name for name, t in tensors.items() if t.numel() == 1)]
    for name, tensor in tensors.items():
        k = tensor.numel()
        if not 0 < k <= 2 * means.shape[1] or k != max(tensor.shape, default=1):
            continue
        for padding_mode, flipped in ((mode, flip) for mode in PADDINGS for flip in (False, True)):
            for left in {(k - 1) // 2, k // 2}:
                sums = correlate(means, tensor.double().flatten(), padding_mode, flipped, left)
                for bias in biases:
                    given = sums if sums is None or bias is None else sums + tensors[bias].double().item()
                    if given is not None and bias != name and agree(given, logits):
                        yield Kernel(name, bias, padding_mode, k, flipped)


def correlate(means: Tensor, kernel: Tensor, padding_mode: str, flipped: bool, left: int) -> Tensor | None:
    """Return the correlation of (N, C) with a kernel, ``left`` taps before each channel; None if C is too small."""
    k = kernel.numel()
    right = k - 1 - left
    c = means.shape[1]
    if max(left, right) > {"circular": c, "reflect": c - 1}.get(padding_mode, k):
        return None
    padded = F.pad(means[:, None], (left, right), mode=PADDINGS[padding_mode])[:, 0]
    return padded.unfold(1, k, 1) @ (kernel.flip(0) if flipped else kernel)


def dilate(kernel: Tensor, dilation: int) -> Tensor:
    """Return ``kernel`` with zeros between its taps."""
    dilated = kernel.new_zeros((len(kernel) - 1) * dilation + 1)
    dilated[::dilation] = kernel
    return dilated


def has_kernel_per_channel(means: Tensor, logits: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Return whether a tensor of C kernels, one for each channel, gives ``logits`` (N, C)."""
    c = means.shape[1]
    for tensor in tensors.values():
        k = tensor.numel() // c
        if k > 1 and tensor.numel() == c * k and tensor.shape[0] == c and k % 2:
            neighbours = F.pad(means, (k // 2, k // 2)).unfold(1, k, 1)
            if agree((neighbours * tensor.double().reshape(c, k)).sum(-1), logits):
                return True
    return False


class FactorECA(ECA):
    """ECA in the place of a module that returns only the factor, which its parent multiplies by."""

    form: Form

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the factor of each channel, in the shape in which the replaced module returned it."""
        self.check_channels(x)
        with ops.reference.disable_autocast(x):
            return shape_factor(self.weigh(ops.reference.squeeze(x, mask)), x, self.form.returns)


@ops.record_as_one_node
def shape_factor(factor: Tensor, x: Tensor, returns: str) -> Tensor:
    """Return a factor (N, C) for ``x`` in the dtype of ``x`` and in one of the shapes of `Form`."""
    factor = factor.to(x.dtype)
    if returns == "flat":
        return factor
    factor = factor[(..., *(None,) * (x.dim() - 2))]
    return factor.expand_as(x) if returns == "input" else factor


def return_factor(gate: ECA, form: Form) -> FactorECA:
    """Return an ECA with the layers of ``gate`` that returns its factor as ``form`` says."""
    factor = FactorECA(gate.channels, gate.kernel_size, padding_mode=gate.padding_mode)
    factor.conv, factor.form = gate.conv, form
    return factor


def convert(probe: Probe, kernel: Kernel, made: dict[object, nn.Parameter]) -> ECA:
    """Return this library's ECA with the kernel of a module; ``made`` maps old tensors to new ones, and is extended.

    A tensor of ECA's own shape is taken as it is: an optimizer that has it keeps it, and what is tied stays tied.
    """
    old, form = probe.run.module, probe.form
    assert form is not None
    gate = ECA(probe.run.shape[1], kernel.size, padding_mode=kernel.padding_mode, bias=kernel.bias is not None)
    gate.conv.weight = take(old, kernel.weight, gate.conv.weight.shape, kernel.flipped, made)
    if kernel.bias is not None:
        gate.conv.bias = take(old, kernel.bias, torch.Size([1]), False, made)
    return gate if form.returns == "product" else return_factor(gate, form)


def take(old: nn.Module, name: str, shape: torch.Size, flipped: bool, made: dict[object, nn.Parameter]) -> nn.Parameter:
    """Return the tensor ``name`` of ``old`` as a parameter of ``shape``."""
    prefix, _, attribute = name.rpartition(".")
    owner = old.get_submodule(prefix)
    tensor: Tensor = getattr(owner, attribute)
    is_parameter = isinstance(tensor, nn.Parameter)
    if is_parameter and tensor.shape == shape and not flipped:
        return tensor
    # What is computed from parameters is a new tensor whenever it is read. It trains if they do; a buffer does not.
    computed = not is_parameter and not any(tensor is buffer for buffer in old.buffers())
    key = (id(owner), attribute) if computed else id(tensor)
    if key not in made:
        trains = any(p.requires_grad for p in old.parameters()) if computed else tensor.requires_grad
        values = tensor.detach().reshape(shape)
        made[key] = nn.Parameter((values.flip(-1) if flipped else values).clone(), requires_grad=trains)
    return made[key]


@torch.no_grad()
def find_error(probe: Probe, gate: ECA) -> str | None:
    """Return how far ``gate`` is from the module with its own parameters, None if only by rounding.

    The two add in another order. A module that rounds to float32 inside differs more in float64 than in float32.
    """
    probe.restore()
    error = 0.0
    for dtype in dict.fromkeys((probe.dtype, torch.float32)):
        probe.dtype = dtype
        probe.module.to(dtype)
        x = probe.make_input(probe.noise(probe.shape[:2], 71), 2)
        theirs, ours = probe.call(x), copy.deepcopy(gate).to(x.device, dtype)(x)
        assert isinstance(theirs, Tensor)
        error = float((ours - theirs).abs().max())
        if error <= 32 * torch.finfo(dtype).eps * float(x.abs().max()):
            return None
    return f"differs from ECA with its kernel by {error:.2g}"
