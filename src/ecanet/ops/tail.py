"""The tail of a residual block: four passes over memory and, between them, algebra on (N, C) numbers.

    m, v = mean and variance of each plane of z         # first pass
    mu, var = those of each channel, from m and v       # law of total variance: nothing cancels
    g = gate(gamma (m - mu) / sqrt(var + eps) + beta)   # the squeeze of norm(z), for which nothing was read
    y = act(A (z - mu) + B + shortcut)                  # second pass: A = g gamma / sqrt(var + eps), B = g beta

Ordinary autograd differentiates the algebra; `nodes` has the passes and their backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from ecanet.errors import ConfigError
from ecanet.ops import nodes
from ecanet.ops.passes import Form, Passes
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, disable_autocast


def squeeze_scale(x: Tensor, gate: Gate, passes: Passes) -> Tensor:
    """``x * gate(mean(x))``: a tail without norm, shortcut and activation."""
    with disable_autocast(x):
        m, _, link = nodes.moments(x, passes, 1)
        return nodes.tail(x, link, None, None, Form(a=gate(m).to(m.dtype).expand_as(m)), passes)[0]


def residual_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None,
    shortcut: Tensor | None,
    shortcut_norm: nn.Module | None,
    activation: Activation,
    passes: Passes,
    second_output: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.residual_tail` by the four passes: y and, with a shortcut, y again on an edge of its own."""
    with disable_autocast(z):
        recomputed = activation if passes.recomputes_sign and shortcut is None else None
        branch = _normalised(z, norm, passes, gate is not None, recomputed)
        a, b = branch.a.expand_as(branch.m), branch.b.expand_as(branch.m)
        if gate is not None:
            g = gate(torch.addcmul(b, a, branch.m - branch.mu)).to(a.dtype)
            a, b = g * a, g * b
        form = Form(a=a, b=b, mu=branch.mu, activation=activation)
        if shortcut is None or shortcut_norm is None:
            return nodes.tail(z, branch.link, shortcut, None, form, passes, second_output)
        side = _normalised(shortcut, shortcut_norm, passes, False, None)
        form = Form(
            a=a, b=b + side.b, mu=branch.mu, shortcut_a=side.a.expand_as(a), shortcut_mu=side.mu, activation=activation
        )
        return nodes.tail(z, branch.link, shortcut, side.link, form, passes, second_output)


class _Normalised(NamedTuple):
    """``norm(z) = a (z - mu) + b``, with the means m of z's planes."""

    link: nodes.GradientLink
    m: Tensor  # N C
    mu: Tensor  # C
    a: Tensor  # C
    b: Tensor  # C


def _normalised(z: Tensor, norm: nn.Module, passes: Passes, squeezed: bool, recomputed: Activation) -> _Normalised:
    by_batch = uses_batch_statistics(norm)
    order = 2 if by_batch else int(squeezed)
    m, v, link = nodes.moments(z, passes, order, recomputed)
    wide = accumulation_dtype(z.dtype)
    if by_batch:
        mu, var = batch_statistics(norm, m, v, z[:1, :1].numel())
    else:
        mu, var = norm.running_mean.to(wide), norm.running_var.to(wide)  # pyright: ignore
    a = torch.rsqrt(var + norm.eps)  # pyright: ignore
    if norm.weight is not None:
        a = a * norm.weight.to(wide)  # pyright: ignore
    b = torch.zeros_like(a) if norm.bias is None else norm.bias.to(wide)  # pyright: ignore
    return _Normalised(link, m, mu, a, b)  # pyright: ignore[reportArgumentType]


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether ``norm`` normalises by this batch (training, or no running statistics) and not by the running ones."""
    if not isinstance(norm, _BatchNorm):
        return False  # a frozen batch norm
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def batch_statistics(norm: nn.Module, m: Tensor, v: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel from those of its planes; updates the norm's running statistics.

    Raises:
        ConfigError: there is one value per channel, which has no variance.
    """
    assert isinstance(norm, _BatchNorm)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    group = sync_group(norm)
    if group is not None:
        return _synchronised_statistics(norm, m, v, positions, group)
    if not m.numel():
        return m.new_zeros(m.shape[1]), m.new_ones(m.shape[1])
    count = len(m) * positions
    if count == 1 and norm.training:
        raise ConfigError(
            "batch norm in training needs more than one value per channel; give a larger batch or model.eval()"
        )
    mu = m.mean(0)
    var = (v + (m - mu).square()).mean(0)
    _track(norm, mu.detach(), var.detach() * (count / max(1, count - 1)))
    return mu, var


def _synchronised_statistics(
    norm: _BatchNorm, m: Tensor, v: Tensor, positions: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The statistics over all processes of ``group`` by one all-reduce of 2 C numbers and the count, and one backward.

    In float64, so that the difference of the two sums keeps all that float32 would.
    """
    wide = m.double()
    count = wide.new_tensor([len(m) * positions])
    sums = positions * torch.stack((wide.sum(0), (v.double() + wide.square()).sum(0)))
    total = all_reduce(torch.cat((sums.flatten(), count)), group=group)
    count = total[-1].detach().clamp(min=1)
    first, second = (total[:-1] / count).view(2, -1)
    mu, var = first.to(m.dtype), (second - first.square()).to(m.dtype)
    _track(norm, mu.detach(), (var.detach() * (count / (count - 1).clamp(min=1))).to(m.dtype))
    return mu, var


def _track(norm: _BatchNorm, mu: Tensor, unbiased: Tensor) -> None:
    """Move the running statistics towards this batch's; ``momentum=None`` makes them the average of all batches."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None:
        return
    factor: float | Tensor = norm.momentum or 0.0
    if norm.momentum is None and norm.num_batches_tracked is not None:
        factor = 1 / norm.num_batches_tracked.to(mu.dtype)
    with torch.no_grad():
        for running, new in ((norm.running_mean, mu), (norm.running_var, unbiased)):
            running.copy_(running + factor * (new - running))


def sync_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a SyncBatchNorm in training sums, None for one process or another norm."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None
