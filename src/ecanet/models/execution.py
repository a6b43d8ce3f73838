"""Run a residual block: by its parts, in few passes over memory, or module by module.

`run` gives what `call` gives, within float rounding. It serves this library's blocks, those of torchvision and timm
after `ecanet.fuse`, and the copies of `ecanet.optimize`, whose norms are folded into the convolutions.
"""

from typing import TypeGuard, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ecanet import ops
from ecanet.models.block import ENDS, DescribesItself, Layer, Parts, describe, gate_of, runnable_parts, tail_gate_of

NORMS = nn.BatchNorm2d, nn.SyncBatchNorm
"""Norms at the end of a shortcut that the tail can apply."""


def call(parts: Parts, x: Tensor) -> Tensor:
    """Call every module of the block once, in order, as plain PyTorch would: (N, C, H, W) -> (N, C', H', W')."""
    y = x
    for layer in parts.branch:
        y = layer.convolution(y)
        y = y if layer.norm is None else layer.norm(y)
        y = y if layer.activation is None else layer.activation(y)
    y = y if parts.attention is None else parts.attention(y)
    return parts.end(y if parts.shortcut is None else y + parts.shortcut(x))


def run(parts: Parts, x: Tensor, shortcut_x: Tensor, second_output: bool = False) -> tuple[Tensor, Tensor]:
    """Run the block by its parts and return its output twice: for the next block's branch, and for its shortcut.

    ``x`` goes into the branch and ``shortcut_x``, the same tensor or the second output of the block before, into the
    shortcut. With ``second_output`` the two outputs are separate outputs of one autograd node, so that the backward
    kernel adds their gradients and autograd does not. Each then carries only one path's gradient.
    """
    *first, last = parts.branch
    for layer in first:
        x = _run_layer(layer, x)
    if last.norm is None:
        y = _end_folded(parts, last.convolution, x, shortcut_x)
        return y, y
    z = last.convolution(x)
    gate = tail_gate_of(parts.attention)
    if parts.attention is not None and gate is None:  # of another form: it must see the whole tensor
        y = parts.attention(last.norm(z))
        y = parts.end(y if parts.shortcut is None else y.add(parts.shortcut(shortcut_x)))
        return y, y
    shortcut, shortcut_norm = _split_shortcut(parts.shortcut, shortcut_x)
    end = ENDS[type(parts.end)]
    return ops.residual_tail_pair(z, last.norm, gate, shortcut, shortcut_norm, end, second_output=second_output)


def _run_layer(layer: Layer, x: Tensor) -> Tensor:
    if layer.norm is None and layer.activation is not None:
        if may_expand(x, layer.convolution, layer.activation):
            return _expand(cast(nn.Conv2d, layer.convolution), x, None, None, layer.activation)
        y = _convolve_relu(layer.convolution, x, None, layer.activation)
        if y is not None:
            return y
    z = layer.convolution(x)
    if layer.norm is not None:
        return normalize(z, layer.norm, cast(nn.Module, layer.activation))
    return z if layer.activation is None else layer.activation(z)


def normalize(z: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """Return ``activation(norm(z))``; in one kernel where `ops` uses kernels and the activation is a plain ReLU."""
    if ops.uses_kernels(z) and type(activation) is nn.ReLU and not ops.must_be_called(activation):
        return ops.residual_tail(z, norm)
    return activation(norm(z))


def _split_shortcut(shortcut: nn.Module | None, x: Tensor) -> tuple[Tensor | None, nn.Module | None]:
    """Return the shortcut of ``x`` without its last norm, and that norm, which the tail applies."""
    if shortcut is None:
        return None, None
    if type(shortcut) is nn.Sequential and len(shortcut) > 1 and isinstance(shortcut[-1], NORMS):
        for module in shortcut[:-1]:
            x = module(x)
        return x, shortcut[-1]
    return shortcut(x), None


# the end of a block without norms


def _end_folded(parts: Parts, convolution: nn.Module, h: Tensor, shortcut_x: Tensor) -> Tensor:
    """Run the last convolution on ``h``, then gate, addition and activation.

    The gate takes its channel means from ``h`` where that has fewer channels than the output: a 1x1 convolution maps
    means to means, ``mean(W h + b) = W mean(h) + b``.
    """
    gate = gate_of(parts.attention)
    early = gate is not None and widens(convolution)
    alone = early or parts.attention is None
    expands = alone and may_expand(h, convolution, parts.end)
    g = _predict_factors(parts, convolution, h, in_kernel=expands) if early else None
    if expands:
        shortcut, offset = _split_bias(parts.shortcut, shortcut_x)
        return _expand(cast(nn.Conv2d, convolution), h, g, shortcut, parts.end, offset)
    shortcut = None if parts.shortcut is None else parts.shortcut(shortcut_x)
    y = _convolve_relu(convolution, h, shortcut, parts.end) if alone and g is None else None
    if y is not None:
        return y
    y = convolution(h)
    if g is None and gate is not None:
        g = _factors(parts, ops.reference.squeeze(y))
    if gate is None and parts.attention is not None:
        y = parts.attention(y)
    return parts.end(_scale_and_add(y, g, shortcut))


def _factors(parts: Parts, p: Tensor) -> Tensor:
    """Return the gate's factors (N, C, 1, 1) for channel means ``p`` (N, C)."""
    gate = gate_of(parts.attention)
    assert gate is not None
    with ops.reference.disable_autocast(p):
        return gate(p)[..., None, None]


def _predict_factors(parts: Parts, convolution: nn.Module, h: Tensor, *, in_kernel: bool) -> Tensor:
    """Return the gate's factors (N, C, 1, 1) behind ``convolution`` of ``h``, in one kernel if the gate has a form."""
    convolution = cast(nn.Conv2d, convolution)
    form = ops.describe_gate(gate_of(parts.attention), convolution.out_channels) if in_kernel else None
    if form is None:
        return _factors(parts, predict_means(convolution, h))
    with ops.reference.disable_autocast(h):
        g = ops.predict_gate(ops.reference.squeeze(h), convolution.weight, convolution.bias, form)
    return g[..., None, None]


def _scale_and_add(y: Tensor, g: Tensor | None, shortcut: Tensor | None) -> Tensor:
    """Return ``y * g + shortcut``, in ``y``'s memory where no gradient needs it.

    Scaling the weights of the convolution before it by g instead is no faster.
    """
    if g is None:
        return y if shortcut is None else y.add_(shortcut)
    g = g.to(y.dtype)
    if shortcut is None:
        return y.mul_(g)
    if isinstance(y, fx.Proxy) or y.requires_grad:
        return torch.addcmul(shortcut, y, g)
    return torch.addcmul(shortcut, y, g, out=y)


def widens(convolution: nn.Module) -> bool:
    """Return whether ``convolution`` is a 1x1 convolution with at least as many channels out as in."""
    return is_pointwise(convolution) and convolution.in_channels <= convolution.out_channels


def is_pointwise(convolution: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether ``convolution`` is a matrix product over the channels at each position."""
    if type(convolution) is not nn.Conv2d or convolution.groups > 1:  # a subclass may compute its weight
        return False
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.padding == (0, 0)


def predict_means(convolution: nn.Module, h: Tensor) -> Tensor:
    """Return the channel means (N, C') of a 1x1 convolution's output, computed from those of its input ``h``."""
    assert isinstance(convolution, nn.Conv2d)
    weight, bias = convolution.weight.flatten(1), convolution.bias
    with ops.reference.disable_autocast(h):
        p = ops.reference.squeeze(h)
        return F.linear(p, weight.to(p.dtype), None if bias is None else bias.to(p.dtype))


# a convolution with everything after it in one kernel


def may_expand(h: Tensor, convolution: nn.Module, end: nn.Module) -> bool:
    """Return whether one kernel shall run ``convolution`` of ``h``, the gate, the addition and ``end``.

    With nothing but a bias too: PyTorch's convolution on a GPU adds that in a pass of its own.

    `ops.prefer_impl` decides where it is used. Without it the kernel runs on a GPU after its proof, but not in float32
    where PyTorch's convolution may round to TF32: the kernel keeps full precision and would be slower.
    """
    if not is_pointwise(convolution) or type(end) not in ENDS or not may_take_kernels(h, convolution.weight):
        return False
    if not h.is_contiguous(memory_format=torch.channels_last):
        return False
    requested, dtype = ops.get_requested_impl(), compute_dtype(h)
    if requested is not None:
        return requested == "fused"
    if not ops.runs_on_gpu(h) or (dtype == torch.float32 and ops.rounds_to_tf32()):
        return False
    return ops.proof.is_proven(h.device, dtype, "expansion")


def may_convolve_relu(h: Tensor, convolution: nn.Module, end: nn.Module) -> bool:
    """Return whether cuDNN may run ``convolution`` of ``h``, bias, addition and ReLU in one kernel, if it is faster."""
    if type(convolution) is not nn.Conv2d or type(end) is not nn.ReLU:
        return False
    if isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        return False
    if not may_take_kernels(h, convolution.weight) or h.dim() != 4 or not h.numel():
        return False
    return ops.get_requested_impl() != "lean" and ops.runs_on_gpu(h) and ops.has_epilogues()


def may_take_kernels(h: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution of ``h`` may run in a kernel without gradients that compilers do not know."""
    if type(h) not in (Tensor, nn.Parameter) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    fits = {compute_dtype(h), h.dtype, weight.dtype} <= set(ops.proof.DTYPES)
    return fits and (is_autocast_on(h) or weight.dtype == h.dtype) and not ops.find_mode_obstacle()


def compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of ``h`` is computed: autocast's where that is on."""
    return torch.get_autocast_dtype(h.device.type) if is_autocast_on(h) else h.dtype


def is_autocast_on(h: Tensor) -> bool:
    """Return whether autocast is on for the device of ``h``; the meta device has none."""
    device = h.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _split_bias(shortcut: nn.Module | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the shortcut of ``x`` without the bias of the convolution that ends it, and that bias, or None."""
    if shortcut is None:
        return None, None
    layers = [one for one in shortcut if type(one) is not nn.Identity] if type(shortcut) is nn.Sequential else []
    last = layers[-1] if layers else None
    if type(last) is not nn.Conv2d or last.padding_mode != "zeros":
        return shortcut(x), None
    for layer in layers[:-1]:
        x = layer(x)
    return F.conv2d(x, last.weight, None, last.stride, last.padding, last.dilation, last.groups), last.bias


def _expand(
    convolution: nn.Conv2d, h: Tensor, g: Tensor | None, shortcut: Tensor | None, end: nn.Module,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = compute_dtype(h)
    bias = None if convolution.bias is None else convolution.bias.to(dtype)
    shortcut = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    return ops.expand(h.to(dtype), convolution.weight.to(dtype), bias, g, shortcut, ENDS[type(end)], offset)


def _convolve_relu(convolution: nn.Module, h: Tensor, shortcut: Tensor | None, end: nn.Module) -> Tensor | None:
    """Return ``end(convolution(h) + shortcut)`` of cuDNN's one kernel, None where PyTorch's operations shall run."""
    if not may_convolve_relu(h, convolution, end):
        return None
    convolution, dtype = cast(nn.Conv2d, convolution), compute_dtype(h)
    bias = None if convolution.bias is None else convolution.bias.to(dtype)
    shortcut = None if shortcut is None else shortcut.to(dtype)
    geometry = ops.Geometry(
        convolution.stride, cast("tuple[int, ...]", convolution.padding), convolution.dilation, convolution.groups
    )
    return ops.convolve_relu(h.to(dtype), convolution.weight.to(dtype), bias, shortcut, geometry)


# blocks in a network


def forward_block(block: DescribesItself, x: Tensor) -> Tensor:
    """Run ``block`` by its parts where that is the same as calling them, else call them."""
    parts = find_parts(block, x)
    return call(block.parts(), x) if parts is None else run(parts, x, x)[0]


def find_parts(block: nn.Module, x: Tensor) -> Parts | None:
    """Return the parts of ``block`` if it shall be run by them, None if it must be called."""
    if is_eager(x):
        return runnable_parts(block)
    if not torch.compiler.is_compiling() or not isinstance(block, DescribesItself) or not ops.compiles_to_kernels(x):
        return None
    # what `runnable_parts` remembers is no matter for a compiler, which traces each block once
    return None if any(ops.must_be_called(module) for module in block.modules()) else describe(block)


def is_eager(x: Tensor) -> bool:
    """Return whether ``x`` is a plain tensor that neither a compiler nor a tracer records.

    Compilers and tracers get the plain modules: a compiler fuses them itself, and a trace shows every module.
    """
    return type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and not ops.is_jit_tracing()


class Stage(nn.Sequential):
    """Residual blocks, one after the other.

    Where kernels run, each block hands the next one its output twice, so that the backward kernel adds the two
    gradients and autograd does not. A block that must be called as a module gets one tensor, and returns one, with all
    of its gradient.
    """

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the blocks: (N, C, H, W) -> (N, C', H', W')."""
        known = [find_parts(block, x) for block in self]
        # Only a block that is run by its parts has a use for a second output.
        follows = [*(parts is not None for parts in known[1:]), False]
        shortcut_x = x
        # On a CPU a second output gains nothing, by measurement.
        gains = torch.is_grad_enabled() and (ops.uses_kernels(x) or ops.compiles_to_kernels(x))
        for block, parts, pair in zip(self, known, follows, strict=True):
            if parts is None:
                x = shortcut_x = block(x)
            else:
                x, shortcut_x = run(parts, x, shortcut_x, pair and gains)
        return x
