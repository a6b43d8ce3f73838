"""What a residual tail asks of whoever reads and writes whole tensors: `lean` in PyTorch, `fused` in Triton.

Planes are (n, c) pairs; P is the number of positions in a plane; what belongs to planes is (N, C), to channels (C,).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ecanet.ops.reference import Activation


@dataclass(frozen=True, kw_only=True)
class Form:
    """``y = act(a (z - mu) + b + s)``, s the shortcut or, with a norm, ``shortcut_a (shortcut - shortcut_mu)``.

    ``a``, ``b``, ``shortcut_a`` are (N, C), ``mu``, ``shortcut_mu`` (C,); None stands for 0 (``shortcut_a``: for 1).
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
    """Whether, without a shortcut, the activation's sign is computed again from z instead of kept."""

    def moments(self, z: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each plane; ``order`` 1 leaves the variance 0, order 0 both.

        Only the mean over the samples of ``variance + mean^2`` is used: it alone must be right.
        """
        ...

    def apply(self, z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
        """``y``, and what `reduce` needs to know where the activation was flat (None: nothing)."""
        ...

    def reduce(
        self, dy: Tensor, second_dy: Tensor | None, kept: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """``sum t (z - mu)``, ``sum t``, ``sum t (shortcut - shortcut_mu)`` over each plane, and t.

        ``t`` is the gradient before the activation; ``dy`` itself stands for it where the sign is computed again.
        The gradient after it is ``dy``, or ``dy + second_dy`` where the output went two ways.
        """
        ...

    def grads(self, t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
        """``dz = a t + dm / P + 2 (z - m) dv / P``; with ``form.activation`` ``t`` is dy, the sign computed again."""
        ...

    def active(self, kept: Tensor, z: Tensor, form: Form) -> Tensor:
        """Boolean, of ``z``'s shape: where the activation passed the gradient on."""
        ...
