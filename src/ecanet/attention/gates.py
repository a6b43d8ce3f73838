"""Squeeze, gate, scale: every module of the paper's Table 2; each class defines only its gate.

p = mean of x over its spatial axes      # N C
g = gain * gate(p)                       # N C
y = x * g                                # N C ...
"""

import math
from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet import ops
from ecanet.attention.base import GatedAttention
from ecanet.errors import AttachError, ConfigError, check_positive_int


def adaptive_kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """Return the kernel size of the paper's rule (Eq. 12): the odd number nearest to ``|(log2(C) + b) / gamma|``.

    The quotient is truncated first, as in the authors' code; an even number becomes the next odd one.

    >>> [adaptive_kernel_size(c) for c in (64, 128, 256, 1024, 2048)]
    [3, 5, 5, 5, 7]

    Raises:
        ConfigError: ``channels`` is not a positive integer, or ``gamma`` is 0.
    """
    channels = check_positive_int("channels", channels)
    numbers: dict[str, object] = {"gamma": gamma, "b": b}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, got {value!r}")
    if gamma == 0:
        raise ConfigError("gamma must not be 0: the kernel size is (log2(C) + b) / gamma")
    t = int(abs((math.log2(channels) + b) / gamma))
    return t if t % 2 else t + 1


class ChannelAttention(GatedAttention):
    """Scale each channel of (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) by a gate on the channel means.

    A subclass defines only ``gate(p)``, from means (N, C) to weights (N, C); the factor is ``gain * gate(p)``. With
    `last_parameters` it can also be attached losslessly.
    """

    reads_means: ClassVar[bool] = True
    """False if the weights are the same for all inputs."""

    def gate(self, p: Tensor) -> Tensor:
        """Return channel weights (N, C) for channel means ``p`` (N, C), both float32 or wider."""
        raise NotImplementedError

    def weigh(self, p: Tensor) -> Tensor:
        """Return the factor of each channel: ``gain * gate(p)``."""
        g = self.gate(p)
        return g if self.gain == 1 else self.gain * g

    def describe_gate(self) -> ops.ChannelGate | None:
        """Return what `weigh` computes, in a form that a kernel can compute; None if it has no such form."""
        return None

    def computes_gate_of(self, kind: "type[ChannelAttention]") -> bool:
        """Return whether `weigh` is that of ``kind``, which neither a subclass nor somebody else has replaced."""
        own = vars(self)
        replaced = type(self).gate is not kind.gate or type(self).weigh is not ChannelAttention.weigh
        return not replaced and "gate" not in own and "weigh" not in own

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x * gain * gate(mean(x))``, in ``x``'s dtype and memory format.

        ``mask`` (N, ...) is boolean and True where a position counts, so that padding does not influence the gate.

        Raises:
            ConfigError: the channel count, dtype or rank of ``x`` is not the one that this module was built for.
        """
        self.check_channels(x)
        return ops.squeeze_scale(x, self.weigh, mask=mask)


class ECA(ChannelAttention):
    """Efficient channel attention (Eq. 9): ``sigmoid(conv1d_k(p))``, one kernel shared by all channels.

    ``kernel_size=None`` derives k from ``channels`` by `adaptive_kernel_size`; an explicit size is used as it is.
    ``conv.weight`` is (1, 1, k), no bias, as in the authors' and timm's checkpoints. With ``bias=True`` one number,
    ``conv.bias`` of shape (1,), is added for all channels, as in many copies of the authors' module.

    >>> eca = ECA(256)
    >>> eca.kernel_size, sum(p.numel() for p in eca.parameters())
    (5, 5)
    >>> eca(torch.randn(2, 256, 7, 7)).shape
    torch.Size([2, 256, 7, 7])

    Raises:
        ConfigError: an even or non-positive ``kernel_size``, or a ``padding_mode`` other than zeros and circular.
    """

    fits_any_width = True

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        gamma: float = 2,
        b: float = 1,
        padding_mode: str = "zeros",
        bias: bool = False,
    ):
        super().__init__(channels)
        k = _check_kernel(kernel_size, channels, gamma, b)
        if padding_mode not in ("zeros", "circular"):
            raise ConfigError(f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}")
        if padding_mode == "circular" and k // 2 > channels:
            raise ConfigError(f"circular padding of kernel_size {k} wraps more than once around {channels} channels")
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, padding_mode=padding_mode, bias=bias)
        self.padding_mode = padding_mode

    @property
    def kernel_size(self) -> int:
        """Number of neighbouring channels, k, that decide one channel's weight."""
        return self.conv.kernel_size[0]

    def gate(self, p: Tensor) -> Tensor:
        """Return ``sigmoid(conv1d_k(p))``."""
        conv = self.conv
        if vars(conv)["_forward_pre_hooks"]:  # pruning and older weight norm compute the weight in a hook
            return conv(p[:, None].to(conv.weight.dtype))[:, 0].to(p.dtype).sigmoid()
        r, weight, bias = conv.kernel_size[0] // 2, conv.weight.to(p.dtype), conv.bias
        bias = None if bias is None else bias.to(p.dtype)
        if self.padding_mode == "circular":
            p, r = F.pad(p[:, None], (r, r), mode="circular")[:, 0], 0
        if ops.is_jit_tracing() or ops.is_exporting():
            return F.conv1d(p[:, None], weight, bias, padding=r).squeeze(1).sigmoid()
        if not torch.is_grad_enabled() and not ops.is_traced(p) and p.device.type == "cpu" and p.shape[0] > 0:
            if p.shape[0] == 1:  # the sample is the one channel of a signal
                return F.conv1d(p, weight, bias, padding=r).sigmoid_()
            # All samples are rows of one image: on a CPU F.conv1d is slow for several samples.
            return F.conv2d(p.unsqueeze(0), weight.unsqueeze(0), bias, padding=(0, r)).squeeze(0).sigmoid_()
        # Otherwise a matrix product over k taps: on a CPU the weight gradient of a convolution is slow.
        kernel = weight[0].transpose(-2, -1)  # k 1
        sums = (F.pad(p, (r, r)).unfold(1, self.kernel_size, 1) @ kernel)[..., 0]
        return (sums if bias is None else sums + bias).sigmoid()

    def describe_gate(self) -> ops.ChannelGate | None:
        """Return kernel, bias, padding and gain, unless a hook computes the kernel."""
        conv = self.conv
        if vars(conv)["_forward_pre_hooks"] or not self.computes_gate_of(ECA):
            return None
        circular = self.padding_mode == "circular"
        return ops.ChannelGate(conv.weight, conv.bias, self.kernel_size, circular=circular, gain=self.gain)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the kernel, and the bias if there is one."""
        return self.conv.parameters()

    def extra_repr(self) -> str:
        """Return the channels and the kernel size; padding and bias where they are not the default."""
        circular = ", padding_mode='circular'" if self.padding_mode == "circular" else ""
        bias = ", bias=True" if self.conv.bias is not None else ""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}{circular}{bias}"


class ECANS(ChannelAttention):
    """ECA-NS (Eq. 7): ``sigmoid(sum_j w[c, j] p[c + j])``, with k weights for each channel: kC parameters."""

    def __init__(self, channels: int, kernel_size: int | None = None, *, gamma: float = 2, b: float = 1):
        super().__init__(channels)
        k = _check_kernel(kernel_size, channels, gamma, b)
        self.conv = nn.Conv1d(channels, channels, k, groups=channels, bias=False)  # weight: C 1 k

    @property
    def kernel_size(self) -> int:
        """Number of neighbouring channels, k, that decide one channel's weight."""
        return self.conv.kernel_size[0]

    def gate(self, p: Tensor) -> Tensor:
        """Return the sigmoid of each channel's neighbourhood, weighted by that channel's own k weights."""
        r = self.kernel_size // 2
        neighbours = F.pad(p, (r, r)).unfold(1, self.kernel_size, 1)  # N C k
        return (neighbours * self.conv.weight[:, 0].to(p.dtype)).sum(-1).sigmoid()

    def describe_gate(self) -> ops.ChannelGate | None:
        """Return the k weights of each channel, and the gain."""
        if not self.computes_gate_of(ECANS):
            return None
        return ops.ChannelGate(self.conv.weight, None, self.kernel_size, own_taps=True, gain=self.gain)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the weights of all channels."""
        return (self.conv.weight,)


class SE(ChannelAttention):
    """Squeeze-and-excitation (Eq. 1, 2): ``sigmoid(W2 relu(W1 p))`` through ``max(1, C // reduction)`` numbers.

    There are no biases by default, as in the paper's parameter counts (2 C^2 / r).
    """

    def __init__(self, channels: int, reduction: int = 16, *, bias: bool = False):
        super().__init__(channels)
        hidden = max(1, channels // check_positive_int("reduction", reduction))
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def gate(self, p: Tensor) -> Tensor:
        """Return ``sigmoid(W2 relu(W1 p))``."""
        return apply_linear(self.fc2, apply_linear(self.fc1, p).relu()).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the second layer."""
        return self.fc2.parameters()


class SEVar1(ChannelAttention):
    """SE-Var1: ``sigmoid(p)``, without parameters."""

    fits_any_width = True

    def gate(self, p: Tensor) -> Tensor:
        """Return the sigmoid of the means."""
        return p.sigmoid()

    def describe_gate(self) -> ops.ChannelGate | None:
        """Return one tap of 1, and the gain."""
        return ops.ChannelGate(None, gain=self.gain) if self.computes_gate_of(SEVar1) else None

    def last_parameters(self) -> Iterable[Tensor]:
        """Refuse: there is no parameter.

        Raises:
            AttachError: always.
        """
        raise AttachError("SE-Var1 has no parameter to zero, so it cannot be inserted losslessly; pass preserve=False")


class SEVar2(ChannelAttention):
    """SE-Var2 (Eq. 4, diagonal): ``sigmoid(w * p)``, one weight for each channel, drawn uniformly from ±1."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.weight.uniform_(-1, 1)

    def gate(self, p: Tensor) -> Tensor:
        """Return ``sigmoid(w * p)``."""
        return (self.weight.to(p.dtype) * p).sigmoid()

    def describe_gate(self) -> ops.ChannelGate | None:
        """Return one weight for each channel, and the gain."""
        if not self.computes_gate_of(SEVar2):
            return None
        return ops.ChannelGate(self.weight, own_taps=True, gain=self.gain)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the weights."""
        return (self.weight,)


class SEVar3(ChannelAttention):
    """SE-Var3 (Eq. 4, full): ``sigmoid(W p)`` with a C x C matrix W."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.fc = nn.Linear(channels, channels, bias=False)

    def gate(self, p: Tensor) -> Tensor:
        """Return ``sigmoid(W p)``."""
        return apply_linear(self.fc, p).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the matrix."""
        return self.fc.parameters()


class SEGC(ChannelAttention):
    """SE-GC (Eq. 5): ``sigmoid(W_G p)`` with W_G block-diagonal in ``groups`` blocks, C^2 / G parameters.

    Instead of ``groups``, ``width`` gives the channels of one block: 16 is the paper's SE-GC2, 8 its SE-GC3.

    Raises:
        ConfigError: ``groups`` or ``width`` does not divide ``channels``.
    """

    def __init__(self, channels: int, groups: int = 16, *, width: int | None = None):
        super().__init__(channels)
        name, given = ("groups", groups) if width is None else ("width", width)
        if channels % check_positive_int(name, given):
            raise ConfigError(f"{name} must divide the {channels} channels, got {given}")
        groups, width = (groups, channels // groups) if width is None else (channels // width, width)
        self.weight = nn.Parameter(torch.empty(groups, width, width))  # G out in
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as `nn.Linear` draws those of a layer of one group's width."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        self.weight.uniform_(-bound, bound)

    def gate(self, p: Tensor) -> Tensor:
        """Return ``sigmoid(W_g p_g)`` in each group g."""
        grouped = cast(Tensor, p.unflatten(1, self.weight.shape[:2]))  # N G in
        return torch.einsum("ngi,goi->ngo", grouped, self.weight.to(p.dtype)).flatten(1).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the blocks of the matrix."""
        return (self.weight,)


def apply_linear(layer: nn.Linear, p: Tensor) -> Tensor:
    """Return ``W p + b`` of ``layer`` in the dtype of ``p``; the layer is called only if a hook computes its weight."""
    if vars(layer)["_forward_pre_hooks"]:
        return layer(p.to(layer.weight.dtype)).to(p.dtype)
    bias = cast("Tensor | None", layer.bias)
    return F.linear(p, layer.weight.to(p.dtype), None if bias is None else bias.to(p.dtype))


def _check_kernel(kernel_size: int | None, channels: int, gamma: float, b: float) -> int:
    if kernel_size is None:
        return adaptive_kernel_size(channels, gamma, b)
    kernel_size = check_positive_int("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size must be odd, got {kernel_size}; try {kernel_size + 1}")
    return kernel_size
