"""The passes over memory of a residual tail, as a protocol: `lean` implements it in PyTorch, `triton.launch` in Triton.

A plane is one channel of one sample, and P is the number of positions in it. Numbers for each plane have shape (N, C),
numbers for each channel (C,).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ecanet.ops.reference import Activation, Gate


@dataclass(frozen=True, kw_only=True)
class Form:
    """The elementwise part of a tail: ``y = act(a (z - mu) + b + s)``.

    ``s`` is the shortcut or, if it has a norm, ``shortcut_a (shortcut - shortcut_mu)``. ``a`` and ``b`` have shape
    (N, C), and (C,) inside the kernels' own node; ``mu``, ``shortcut_a`` and ``shortcut_mu`` have (C,). None means 0,
    and 1 for ``shortcut_a``.
    """

    a: Tensor
    b: Tensor | None = None
    mu: Tensor | None = None
    shortcut_a: Tensor | None = None
    shortcut_mu: Tensor | None = None
    activation: Activation = None


class Passes(Protocol):
    """One method for each pass over memory."""

    recomputes_sign: bool
    """True if the backward of a tail without a shortcut recomputes the activation's sign from z; else it is saved."""

    def run_tail(
        self,
        z: Tensor,
        norm: nn.Module,
        gate: Gate | None,
        shortcut: Tensor | None,
        shortcut_norm: nn.Module | None,
        activation: Activation,
        second_output: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Return `tail.residual_tail` if these passes have a way of their own to compute it, else None."""
        ...

    def moments(self, z: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each plane. With ``order`` 1 the variance is 0, with 0 both are.

        Each variance is off by the roundings of a sum of its terms, and by at most ``(64 eps mean)^2``.
        """
        ...

    def apply(self, z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
        """Return ``y``, and what `reduce` needs to find where the activation's slope is 0 (None if nothing)."""
        ...

    def reduce(
        self, dy: Tensor, second_dy: Tensor | None, kept: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return ``sum t (z - mu)``, ``sum t``, ``sum t (shortcut - shortcut_mu)`` over each plane, and ``t``.

        ``t`` is the gradient before the activation. The gradient after it is ``dy``, or ``dy + second_dy`` if the tail
        has a second output. Where the sign is recomputed the returned ``t`` is ``dy``, and `grads` applies the sign.
        """
        ...

    def grads(self, t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
        """Return ``dz = a t + dm / P + 2 (z - m) dv / P``.

        With ``form.activation`` ``t`` is the gradient after the activation, whose sign is recomputed from z.
        """
        ...

    def find_active(self, kept: Tensor, z: Tensor, form: Form) -> Tensor:
        """Return a boolean tensor of ``z``'s shape: True where the activation passes the gradient on."""
        ...
