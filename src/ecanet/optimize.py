"""An inference copy of a ResNet: norms folded, the gate before the expansion, addition and activation in place."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from ecanet.attention.gates import ChannelAttention
from ecanet.errors import ConfigError
from ecanet.models.tail import hooked
from ecanet.ops import reference


def optimize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference only, with the same outputs within float rounding.

    Batch norms go into the convolutions before them. A block that ends in a 1x1 convolution computes its gate from
    the narrow tensor before it, because ``mean(W h + b) = W mean(h) + b``, so that attention reads a quarter of what
    it scales. Gate and addition are one operation, the activation is in place, weights are channels-last.
    ``model`` is left as it is. Takes this library's ResNets and those of torchvision and timm, with or without
    attention; blocks of another shape keep their forward.

    Raises:
        ConfigError: no block of ``model`` is of a shape known here.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    blocks = list(residual_blocks(copied))
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no residual block that optimize() knows; it takes ResNets")
    for parent, name, block in blocks:
        parent.register_module(name, InferenceBlock(block))
    fold_norms(copied)
    return copied.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class InferenceBlock(nn.Module):
    """A residual block with folded norms: ``relu(branch * gate + shortcut)``."""

    def __init__(self, block: nn.Module):
        super().__init__()
        convolutions, norms = parts_of(block)
        self.branch = nn.ModuleList(map(folded, convolutions, norms))
        self.gate = gate_of(block)
        self.downsample = getattr(block, "downsample", None) or nn.Identity()
        fold_norms(self.downsample)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        *first, last = self.branch
        h = x
        for convolution in first:
            h = F.relu_(convolution(h))
        shortcut = self.downsample(x)
        if self.gate is None:
            return F.relu_(last(h).add_(shortcut))
        if expands(last):
            g = self.gate(squeezed(last, h))
            y = last(h)
        else:
            y = last(h)
            g = self.gate(reference.squeeze(y))
        return F.relu_(torch.addcmul(shortcut, y, g[..., None, None].to(y.dtype), out=y))


def squeezed(convolution: nn.Module, h: Tensor) -> Tensor:
    """Channel means of a 1x1 convolution's output, from the means of its input."""
    weight, bias = convolution.weight.flatten(1), convolution.bias  # pyright: ignore
    p = reference.squeeze(h)
    return F.linear(p, weight.to(p.dtype), bias.to(p.dtype))  # pyright: ignore[reportArgumentType]


def expands(convolution: nn.Module) -> bool:
    """Whether the means of ``convolution``'s output follow from those of its input."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.groups == 1


def residual_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """``(parent, name, block)`` for each block that `InferenceBlock` can stand for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("BasicBlock", "Bottleneck") and known(child):
                yield parent, name, child


def known(block: nn.Module) -> bool:
    """Whether ``block`` is conv, norm, ReLU, ..., conv, norm, gate, addition, ReLU and nothing else."""
    try:
        convolutions, norms = parts_of(block)
        gate_of(block)
    except (AttributeError, ConfigError):
        return False
    ours = attached_to(block)
    if any(hooked(m) for m in block.modules() if ours is None or m not in (block, norms[-1])):
        return False
    for name in ("drop_path", "drop_block", "aa"):  # timm's options
        if not isinstance(getattr(block, name, None), nn.Identity | None):
            return False
    plain = all(type(n) is nn.BatchNorm2d and n.running_mean is not None for n in norms)
    return plain and all(type(c) is nn.Conv2d for c in convolutions) and relu(block)


def relu(block: nn.Module) -> bool:
    """Whether all the block's activations are ReLU."""
    names = ("relu", "act1", "act2", "act3")
    found = [getattr(block, name) for name in names if hasattr(block, name)]
    return bool(found) and all(isinstance(m, nn.ReLU | nn.Identity) for m in found)


def parts_of(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The branch's convolutions and norms, in order."""
    count = 3 if hasattr(block, "conv3") else 2
    convolutions = [block.get_submodule(f"conv{i}") for i in range(1, count + 1)]
    return convolutions, [block.get_submodule(f"bn{i}") for i in range(1, count + 1)]


def gate_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The block's gate as a function of channel means; None without attention.

    Raises:
        ConfigError: its attention is not of the form squeeze, gate, scale.
    """
    attention = getattr(block, "attention", None) or getattr(block, "se", None)
    if attention is None:
        attention = attached_to(block)
    if attention is None or isinstance(attention, nn.Identity):
        return None
    if isinstance(attention, ChannelAttention):
        return _Weigh(attention)
    name = type(attention).__name__  # timm's, by name: timm is not a dependency
    if (name == "EcaModule" and attention.conv2 is None) or (name == "SEModule" and not attention.add_maxpool):
        return _TimmGate(attention)
    raise ConfigError(f"{type(attention).__name__} is not of the form squeeze, gate, scale")


def attached_to(block: nn.Module) -> ChannelAttention | None:
    """The gate that `ecanet.attach` hung behind the last norm of ``block``, if it did just that."""
    found = [m for m in block.children() if isinstance(m, ChannelAttention) and hasattr(m, "attachment")]
    last = f"bn{len(parts_of(block)[1])}"
    return found[0] if len(found) == 1 and getattr(found[0], "attachment").target == last else None  # noqa: B009


class _Weigh(nn.Module):
    """A `ChannelAttention`'s weights for channel means."""

    def __init__(self, attention: ChannelAttention):
        super().__init__()
        self.attention = attention

    def forward(self, p: Tensor) -> Tensor:
        return self.attention.weigh(p)


class _TimmGate(nn.Module):
    """What timm's EcaModule and SEModule multiply by, from channel means."""

    def __init__(self, attention: Any):
        super().__init__()
        self.attention = attention

    def forward(self, p: Tensor) -> Tensor:
        module = self.attention
        if not hasattr(module, "fc1"):
            return module.gate(module.conv(p[:, None])).flatten(1)
        return module.gate(module.fc2(module.act(module.bn(module.fc1(p[..., None, None]))))).flatten(1)


def folded(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    """``convolution`` with ``norm`` in its weights."""
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    # in float64, so that the folded weights are rounded once
    wide = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(norm).double())
    return wide.to(convolution.weight.dtype).requires_grad_(False)


def fold_norms(model: nn.Module) -> None:
    """Fold each batch norm that follows a convolution directly: in a Sequential, or as conv1 and bn1 of a network."""
    for parent in model.modules():
        if isinstance(parent, InferenceBlock):
            continue
        for first, second in pairwise(list(parent._modules)):
            convolution, norm = parent._modules[first], parent._modules[second]
            follows = isinstance(parent, nn.Sequential) or (first, second) == ("conv1", "bn1")
            plain = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None
            if follows and plain and not hooked(norm):  # pyright: ignore[reportArgumentType]
                parent._modules[first] = folded(convolution, norm)  # pyright: ignore[reportArgumentType]
                parent._modules[second] = nn.Identity()
