"""An inference copy of a network: norms folded, the gate read where it is cheap, addition and activation in place."""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference.block import Parts, parts_of, squeezes, weights
from ecanet.ops import proof, reference, watched


def optimize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference only, with the same outputs within float rounding; ``model`` stays as it is.

    Batch norms go into the convolutions before them, gate and addition are one operation, activations work in place,
    weights are channels-last. A gate takes its channel means from the tensor before a last 1x1 convolution where that
    has fewer channels, because ``mean(W h + b) = W mean(h) + b``: in a bottleneck attention then reads a quarter of
    what it scales. On a GPU, without gradients, the kernel of that convolution applies gate, addition and activation
    (`ops.expansion`), once it has shown there that it is right; `ops.prefer_impl` decides otherwise.

    Takes every network of `create_model` and `create_detector`, torchvision's ResNets and MobileNetV2 and timm's
    ResNets, with or without attention, built in or attached. Attention of another form than squeeze, gate, scale is
    called as it is, and so is a block that something hooks into.

    >>> import ecanet
    >>> model = ecanet.create_model("resnet8").eval()
    >>> fast = ecanet.optimize(model)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
    True

    Raises:
        ConfigError: ``model`` is no network, or has no block of a kind known here.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"optimize takes a network (a torch.nn.Module), got {model!r}")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    found = False
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            parts = parts_of(child)
            if parts is not None:
                parent.register_module(name, InferenceBlock(parts))
                found = True
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no block that optimize knows; it takes ResNets and MobileNetV2 of ecanet and "
            f"torchvision, and timm's ResNets"
        )
    fold_norms(copied)
    return copied.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class InferenceBlock(nn.Module):
    """A residual block with folded norms: ``end(attention(branch(x)) + shortcut(x))``."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.branch = nn.ModuleList(folded(*pair) for pair in parts.branch)
        self.attention = parts.attention
        if self.attention is not None:
            vars(self.attention).pop("attachment", None)  # `ecanet.attach` can undo nothing here
        self.shortcut = parts.shortcut
        self.activation = parts.activation
        self.end = parts.end
        self.by_means = squeezes(self.attention)
        self.narrow = self.by_means and expands(self.branch[-1])
        known = pointwise(self.branch[-1]) and type(self.end) in ENDS
        worth = self.narrow or (self.shortcut is not None and self.attention is None)
        self.fusible = known and worth  # gate, addition and activation in the last convolution

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        *first, last = self.branch
        h = x
        for convolution in first:
            h = self.activation(convolution(h))
        if self.fusible and fuses(h, last, self.end):
            return self.fused(h, x)
        if self.narrow:
            g = self.gate(squeezed(last, h))
            y = last(h)
        else:
            y = last(h)
            g = self.gate(reference.squeeze(y)) if self.by_means else None
        if self.attention is not None and g is None:
            y = self.attention(y)
        return self.end(finished(y, g, None if self.shortcut is None else self.shortcut(x)))

    def fused(self, h: Tensor, x: Tensor) -> Tensor:
        """All that follows ``h``, in the kernel of the last convolution."""
        last = self.branch[-1]
        g = self.gate(squeezed(last, h)) if self.narrow else None
        shortcut = None if self.shortcut is None else self.shortcut(x).contiguous(memory_format=torch.channels_last)
        dtype = computed(h)
        bias = None if last.bias is None else last.bias.to(dtype)  # pyright: ignore
        return ops.expand(h.to(dtype), last.weight.to(dtype), bias, g, shortcut, ENDS[type(self.end)])  # pyright: ignore

    def gate(self, p: Tensor) -> Tensor:
        """Weights (N, C, 1, 1) for channel means (N, C)."""
        assert self.attention is not None
        with reference.disable_autocast(p):
            return weights(self.attention, p)[..., None, None]


ENDS: dict[type, ops.Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Identity: None}
"""Ends of blocks that the kernel of a last convolution knows."""


def fuses(h: Tensor, convolution: nn.Module, end: nn.Module) -> bool:
    """Whether that kernel takes ``convolution`` of ``h`` and ``end``: see `ops.prefer_impl` for who decides.

    By itself not in float32 where PyTorch's convolution may round to TF32: the kernel does not, which is slower.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or ops.find_mode_obstacle(h)
    ):
        return False
    dtype = computed(h)
    plain = type(h) in (Tensor, nn.Parameter) and h.is_contiguous(memory_format=torch.channels_last)
    weight: Any = convolution.weight
    cast = torch.is_autocast_enabled(h.device.type)
    fits = {dtype, h.dtype, weight.dtype} <= set(proof.DTYPES) and (cast or weight.dtype == h.dtype)
    if not plain or not fits or watched(convolution) or watched(end):
        return False
    if ops.requested_impl() is not None:
        return ops.requested_impl() == "fused"
    if not ops.runs_on_gpu(h) or (dtype == torch.float32 and rounds_to_tf32()):
        return False
    return proof.is_proven(h.device, dtype, "expansion")


def rounds_to_tf32() -> bool:
    """Whether PyTorch's convolutions on a GPU may round float32 inputs to TF32, which is its default."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore


def computed(h: Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``h`` is computed."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def finished(y: Tensor, g: Tensor | None, shortcut: Tensor | None) -> Tensor:
    """``y * g + shortcut`` in ``y``'s memory. Scaling the weights of the convolution before by g is no faster."""
    if g is None:
        return y if shortcut is None else y.add_(shortcut)
    g = g.to(y.dtype)
    if shortcut is None:
        return y.mul_(g)
    return torch.addcmul(shortcut, y, g, out=None if y.requires_grad else y)


def squeezed(convolution: nn.Module, h: Tensor) -> Tensor:
    """Channel means of a 1x1 convolution's output, from the means of its input."""
    weight, bias = convolution.weight.flatten(1), convolution.bias  # pyright: ignore
    with reference.disable_autocast(h):
        p = reference.squeeze(h)
        return F.linear(p, weight.to(p.dtype), None if bias is None else bias.to(p.dtype))  # pyright: ignore


def expands(convolution: nn.Module) -> bool:
    """Whether the means of ``convolution``'s output follow from those of an input with fewer channels."""
    return pointwise(convolution) and convolution.in_channels < convolution.out_channels  # pyright: ignore


def pointwise(convolution: nn.Module) -> bool:
    """Whether ``convolution`` is a matrix product over channels, at each position."""
    if not isinstance(convolution, nn.Conv2d) or convolution.groups > 1:
        return False
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.padding == (0, 0)


def folded(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    """``convolution`` with ``norm`` in its weights; one after the other where that cannot be."""
    if not foldable(convolution, norm):
        return nn.Sequential(convolution, norm)
    # in float64, so that the folded weights are rounded once
    wide = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(norm).double())  # pyright: ignore
    return wide.to(convolution.weight.dtype).requires_grad_(False)  # pyright: ignore


def foldable(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm with statistics of its own, and ``convolution`` a plain one."""
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or ops.is_frozen_norm(norm)
    return type(convolution) is nn.Conv2d and known and norm.running_mean is not None


def fold_norms(model: nn.Module) -> None:
    """Fold each norm that directly follows a convolution: in a Sequential, or as conv1 and bn1 of a ResNet."""
    for parent in list(model.modules()):
        in_order = type(parent).forward is nn.Sequential.forward
        resnet = type(parent).__name__ in ("ResNet", "IntermediateLayerGetter")  # the latter inside detectors
        for first, second in pairwise(list(parent._modules)):
            convolution, norm = parent._modules[first], parent._modules[second]
            if (
                convolution is None
                or norm is None
                or not (in_order or (resnet and (first, second) == ("conv1", "bn1")))
            ):
                continue
            if foldable(convolution, norm) and not (watched(convolution) or watched(norm)):
                parent._modules[first] = folded(convolution, norm)
                parent._modules[second] = nn.Identity()
