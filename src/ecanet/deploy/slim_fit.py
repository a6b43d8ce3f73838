"""The constant that stands for a gate best: a scale and a bias for each channel, by least squares over images."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ecanet import progress
from ecanet.attention import ChannelAttention
from ecanet.errors import AttachError

__all__ = ["Constant", "Frozen", "find_constant_factor", "fit"]

STILL = 1e-6
"""A gate whose factors spread less than this is constant on the images: its factors are rounding around their mean."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """``y = scale * x + bias`` (C each, float64) in the place of a gate, and how far the gate is from constant."""

    scale: Tensor
    bias: Tensor
    spread: float
    """Standard deviation of a channel's factor over the images, averaged over the channels."""
    size: Tensor
    """Root mean square of each channel of the gate's input (C)."""
    biased: bool
    """Whether the layer that is to take the constant can take a bias."""

    @property
    def still(self) -> bool:
        """True if the gate was constant on all images, so that nothing is lost."""
        return self.spread <= STILL


class Frozen(nn.Module):
    """``scale * x + bias``, with the channels on axis 1: what a gate is while it is tried as a constant."""

    scale: Tensor
    bias: Tensor

    def __init__(self, constant: Constant, like: Tensor):
        super().__init__()
        self.register_buffer("scale", constant.scale.to(like.device, like.dtype), persistent=False)
        self.register_buffer("bias", constant.bias.to(like.device, like.dtype), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``scale * x + bias`` in the dtype of ``x`` (N, C, ...)."""
        shape = (-1, *(1 for _ in x.shape[2:]))
        return x * self.scale.to(x.dtype).reshape(shape) + self.bias.to(x.dtype).reshape(shape)


def find_constant_factor(module: nn.Module) -> Tensor | None:
    """Return the factors (C) of a gate that is constant by construction; None for all others.

    These are ASR, and the gates that `ecanet.attach` has put in and nobody has trained.
    """
    if not isinstance(module, ChannelAttention):
        return None
    try:
        neutral = module.gain == 2 and not any(bool(p.any()) for p in module.last_parameters())
    except AttachError:  # this gate has no last parameters
        neutral = False
    if module.reads_means and not neutral:
        return None
    like = next(module.parameters())
    with torch.no_grad():
        return module.weigh(torch.zeros(1, module.channels, device=like.device, dtype=torch.float64))[0]


class Sums:
    """Sums over the images for one gate, in float64, from which `Sums.solve` makes its constant."""

    def __init__(self) -> None:
        self.count = 0
        self.moments: Tensor | int = 0
        """Sums of x, y, x x and x y (4 C) over images and positions."""
        self.factors: Tensor | int = 0
        """Number of factors, their sum and the sum of their squares (3 C) over the images."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the input and the output (N, C, ...) of the gate for a few images."""
        x, y = (t.detach().double().reshape(*t.shape[:2], -1) for t in (x, y))
        xx, xy = (x * x).sum(2), (x * y).sum(2)  # N C
        self.moments = self.moments + torch.stack([x.sum((0, 2)), y.sum((0, 2)), xx.sum(0), xy.sum(0)])
        self.count += x.shape[0] * x.shape[2]
        seen = xx > 0  # a plane of zeros shows no factor
        factor = torch.where(seen, xy / xx.where(seen, 1), 0)
        self.factors = self.factors + torch.stack([seen.sum(0), factor.sum(0), factor.square().sum(0)])

    def solve(self, *, biased: bool) -> Constant:
        """Return the least-squares scale and bias of each channel; without ``biased`` the bias is 0."""
        assert isinstance(self.moments, Tensor)
        assert isinstance(self.factors, Tensor)
        number, total, squares = self.factors
        mean = torch.where(number > 0, total / number.clamp(min=1), 1)
        variance = (squares / number.clamp(min=1) - mean.square()).clamp(min=0)
        spread = float(variance.where(number > 0, 0).sqrt().mean())
        x, y, xx, xy = self.moments / self.count
        zero = torch.zeros_like(x)
        found = Constant(scale=mean, bias=zero, spread=spread, size=xx.sqrt(), biased=biased)
        if found.still:
            return found
        through_zero = torch.where(xx > 0, xy / xx.where(xx > 0, 1), mean)
        if not biased:
            return replace(found, scale=through_zero)
        inner = xx - x * x
        varies = inner > 1e-12 * xx  # else the channel is one number, and a line through it is not determined
        scale = torch.where(varies, (xy - x * y) / inner.where(varies, 1), through_zero)
        return replace(found, scale=scale, bias=torch.where(varies, y - scale * x, zero))


@torch.no_grad()
def fit(model: nn.Module, gates: Mapping[nn.Module, bool], batches: Iterable[Tensor]) -> dict[nn.Module, Constant]:
    """Run ``batches`` through ``model`` once and return the constants of ``gates``, which say if a bias is allowed."""
    sums = {gate: Sums() for gate in gates}
    with record(sums):
        for images in progress.track(batches, "measuring the gates"):
            model(images)
    return {gate: sums[gate].solve(biased=biased) for gate, biased in gates.items()}


@contextmanager
def record(sums: Mapping[nn.Module, Sums]) -> Generator[None]:
    """In this context, add what goes into each gate and what comes out of it to its sums."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(gate: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[gate] = args[0].detach().clone()  # a gate may work in place

    def add(gate: nn.Module, args: object, output: Tensor) -> None:
        sums[gate].add(inputs.pop(gate), output)

    handles = [gate.register_forward_pre_hook(keep) for gate in sums]
    handles += [gate.register_forward_hook(add) for gate in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
