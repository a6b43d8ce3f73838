"""The operations of channel attention: one specification, several implementations.

Read downward: `dispatch` (chooses the implementation), `proof` (checks the kernels on a device before networks use
them), `triton` (the passes as kernels for a GPU), `lean` (the passes in PyTorch), `tail` (the algebra between the
passes), `nodes` (the autograd functions around it), `passes` (what an implementation of the passes must offer),
`reference` (the specification, in plain PyTorch), `calls` (must a module be called, or may its parts be used?).
"""

from ecanet.ops import lean, proof, reference
from ecanet.ops.calls import genuine, has_any_global_hook, hooks_of, replaced, watched
from ecanet.ops.dispatch import (
    Impl,
    accelerated,
    asked,
    automatic,
    check,
    expand,
    frozen,
    fuses,
    implementations,
    mode,
    residual_tail,
    residual_tail_twice,
    squeeze_scale,
)
from ecanet.ops.reference import Activation, Gate

__all__ = [
    "Activation",
    "Gate",
    "Impl",
    "accelerated",
    "asked",
    "automatic",
    "check",
    "expand",
    "frozen",
    "fuses",
    "genuine",
    "has_any_global_hook",
    "hooks_of",
    "implementations",
    "lean",
    "mode",
    "proof",
    "reference",
    "replaced",
    "residual_tail",
    "residual_tail_twice",
    "squeeze_scale",
    "watched",
]
