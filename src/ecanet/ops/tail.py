"""The tail of a residual block: four passes over memory and, between them, algebra on (N, C) numbers.

    m, v = mean and variance of each plane of z         # first pass
    mu, var = mean and variance of each channel         # from m and v, by the law of total variance
    g = gate(gamma (m - mu) / sqrt(var + eps) + beta)   # the argument is the squeeze of norm(z), without another pass
    y = act(A (z - mu) + B + shortcut)                  # second pass: A = g gamma / sqrt(var + eps), B = g beta

A `MomentsGate` also takes the variances of norm(z)'s planes, ``v gamma^2 / (var + eps)``. Their gradient reaches z in
the backward's last pass, together with that of the norm's own variance.

The backward takes two more passes: `nodes` contains all four. Ordinary autograd differentiates the algebra.

The law of total variance is ``var = mean_n v + mean_n (m - mu)^2``. All its terms are positive, so nothing cancels,
unlike in ``mean z^2 - mu^2``, which loses all digits where the mean is large beside the standard deviation.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ecanet.errors import ConfigError
from ecanet.ops import nodes
from ecanet.ops.passes import Form, Passes
from ecanet.ops.reference import (
    Activation,
    Gate,
    MomentsGate,
    accumulation_dtype,
    disable_autocast,
    find_constant_planes,
)


def squeeze_scale(x: Tensor, gate: Gate, passes: Passes) -> Tensor:
    """Return ``x * gate(mean(x))``: a tail without norm, shortcut and activation."""
    with disable_autocast(x):
        m, v, link = nodes.compute_moments(x, passes, _find_order(gate))
        g = _weigh(gate, m, v, m, None, x)
        return nodes.apply_tail(x, link, None, None, Form(a=g.to(m.dtype).expand_as(m)), passes)[0]


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
    """Return `reference.residual_tail` twice, computed by the four passes; see `nodes.apply_tail` for the second."""
    whole = passes.run_tail(z, norm, gate, shortcut, shortcut_norm, activation, second_output)
    if whole is not None:
        return whole
    with disable_autocast(z):
        recomputed = activation if passes.recomputes_sign and shortcut is None else None
        branch = _fold_norm(z, norm, passes, 0 if gate is None else _find_order(gate), recomputed)
        a, b = branch.a.expand_as(branch.m), branch.b.expand_as(branch.m)
        if gate is not None:
            p = torch.addcmul(b, a, branch.m - branch.mu)
            g = _weigh(gate, branch.m, branch.v, p, branch.a, z).to(a.dtype)
            a, b = g * a, g * b
        form = Form(a=a, b=b, mu=branch.mu, activation=activation)
        if shortcut is None or shortcut_norm is None:
            return nodes.apply_tail(z, branch.link, shortcut, None, form, passes, second_output)
        side = _fold_norm(shortcut, shortcut_norm, passes, 0, None)
        form = Form(a=a, b=b + side.b, mu=branch.mu, shortcut_a=side.a, shortcut_mu=side.mu, activation=activation)
        return nodes.apply_tail(z, branch.link, shortcut, side.link, form, passes, second_output)


def _find_order(gate: Gate) -> int:
    """Return how many moments of each plane ``gate`` needs."""
    return 2 if isinstance(gate, MomentsGate) else 1


def _weigh(gate: Gate, m: Tensor, v: Tensor, p: Tensor, a: Tensor | None, z: Tensor) -> Tensor:
    """Return the weights of ``gate`` for planes ``a z + ...`` with means p, where z has the moments m and v."""
    if not isinstance(gate, MomentsGate):
        return gate(p)
    v = v.masked_fill(find_constant_planes(m.detach(), v.detach()), 0)
    return gate.weigh_moments(p, v if a is None else a.square() * v, z[:1, :1].numel() if len(z) else 1)


class _AffineNorm(NamedTuple):
    """A norm as ``norm(z) = a (z - mu) + b``, the moments m and v of z's planes, and the link to their node."""

    link: nodes.GradientLink
    m: Tensor  # N C
    v: Tensor  # N C; 0 if only the means were needed
    mu: Tensor  # C
    a: Tensor  # C
    b: Tensor  # C


def _fold_norm(z: Tensor, norm: nn.Module, passes: Passes, order: int, recomputed: Activation) -> _AffineNorm:
    """Return ``norm`` for this ``z``, of whose moments the gate needs ``order``; update its running statistics."""
    by_batch = uses_batch_statistics(norm)
    m, v, link = nodes.compute_moments(z, passes, 2 if by_batch else order, recomputed)
    wide = accumulation_dtype(z.dtype)
    known = cast(_BatchNorm, norm)  # or torchvision's FrozenBatchNorm2d, which has the same attributes as buffers
    if by_batch:
        mu, var = compute_batch_statistics(norm, m, v, z[:1, :1].numel())
    else:
        mu, var = cast(Tensor, known.running_mean).to(wide), cast(Tensor, known.running_var).to(wide)
    weight, bias = cast(Tensor | None, known.weight), cast(Tensor | None, known.bias)  # None if affine=False
    a = torch.rsqrt(var + known.eps)
    if weight is not None:
        a = a * weight.to(wide)
    b = torch.zeros_like(a) if bias is None else bias.to(wide)
    return _AffineNorm(link, m, v, mu, a, b)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Return whether ``norm`` normalises by the statistics of the batch, not by its running statistics.

    That is so in training, and for a batch norm that has no running statistics.
    """
    if not isinstance(norm, _BatchNorm):
        return False  # a frozen batch norm
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def compute_batch_statistics(norm: nn.Module, m: Tensor, v: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, and update the norm's running statistics.

    ``m`` and ``v`` (N, C) are those of the planes, each of ``positions`` elements.

    Raises:
        ConfigError: There is one value per channel, which has no variance.
    """
    assert isinstance(norm, _BatchNorm)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    group = find_sync_group(norm)
    if group is not None:
        return _compute_synchronised_statistics(norm, m, v, positions, group)
    if not m.numel():
        return m.new_zeros(m.shape[1]), m.new_ones(m.shape[1])
    count = len(m) * positions
    if count == 1 and norm.training:
        raise ConfigError(
            "batch norm in training needs more than one value per channel, got 1; give a larger batch or call "
            "model.eval()"
        )
    mu = m.mean(0)
    var = (v + (m - mu).square()).mean(0)  # law of total variance
    _update_running_statistics(norm, mu.detach(), var.detach() * (count / max(1, count - 1)))
    return mu, var


def _compute_synchronised_statistics(
    norm: _BatchNorm, m: Tensor, v: Tensor, positions: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return mean and variance over all processes of ``group``.

    It takes one all-reduce of 2 C numbers and the count, and one more in the backward. The law of total variance would
    need a second one, for the deviations from the common mean. Instead ``var = mean z^2 - mu^2`` is computed in
    float64, where the difference keeps all digits that float32 has.
    """
    wide = m.double()
    first, second = positions * wide.sum(0), positions * (v.double() + wide.square()).sum(0)
    mean, variance, count = average_over_processes(first, second, len(m) * positions, group)
    mu, var = mean.to(m.dtype), variance.to(m.dtype)
    _update_running_statistics(norm, mu.detach(), (var.detach() * (count / (count - 1).clamp(min=1))).to(m.dtype))
    return mu, var


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum in every process."""
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum of the gradients, which can be differentiated again."""
        return cast(Tensor, _SumOverProcesses.apply(gradient, ctx.group)), None


def average_over_processes(
    first: Tensor, second: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel over all processes of ``group``, and the number of elements.

    ``first`` and ``second`` (C,) are this process's sums of z and z^2 in float64, of ``count`` elements a channel.
    """
    sums = torch.cat((first, second, first.new_full((1,), count)))  # a tensor made from a list would be copied
    total = cast(Tensor, _SumOverProcesses.apply(sums, group))
    elements = total[-1].detach().clamp(min=1)
    mean, square = (total[:-1] / elements).view(2, -1)
    return mean, square - mean.square(), elements


def _update_running_statistics(norm: _BatchNorm, mu: Tensor, unbiased: Tensor) -> None:
    """Move the running statistics towards those of this batch.

    With ``momentum=None`` they are the average of all batches, as in PyTorch.
    """
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None:
        return
    factor: float | Tensor = norm.momentum or 0.0
    if norm.momentum is None and norm.num_batches_tracked is not None:
        factor = 1 / norm.num_batches_tracked.to(mu.dtype)
    with torch.no_grad():
        for running, new in ((norm.running_mean, mu), (norm.running_var, unbiased)):
            running.copy_(running + factor * (new - running))


def find_sync_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """Return the processes over which a SyncBatchNorm in training sums; None for one process or another norm."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None
