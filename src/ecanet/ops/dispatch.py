"""Operations with one meaning and several implementations; ``reference.py`` is the meaning.

``impl="reference"`` is plain PyTorch, ``"lean"`` the same in fewer passes over memory (any device), ``"fused"`` the
fewest, in Triton kernels (CUDA). ``"auto"`` is fused on a GPU where the kernels have shown that they are right, with a
warning where they have not (`proof`); lean elsewhere; and the reference where neither applies: under export,
forward-mode differentiation and `torch.func`, with a mask, and under `torch.compile`, which fuses the reference itself.
For whole networks `prefer_impl` decides. An explicit choice is never replaced by another: it raises where it does not
apply.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ecanet.errors import ConfigError
from ecanet.ops import lean, proof, reference, tail
from ecanet.ops.calls import has_original_forward, must_be_called
from ecanet.ops.passes import Passes
from ecanet.ops.reference import Activation, Gate
from ecanet.ops.tracing import is_jit_tracing, is_traced

__all__ = ["Activation", "Gate", "Impl", "prefer_impl", "residual_tail", "residual_tail_pair", "squeeze_scale"]

Impl = Literal["auto", "reference", "lean", "fused"]

KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norms, exactly: a subclass may do more in its forward."""

_requests: list[tuple[object, Literal["lean", "fused"]]] = []
"""What the open `prefer_impl` blocks ask for; the last one counts. Not by thread: checkpoints are computed again in
autograd's."""


@contextmanager
def prefer_impl(impl: Literal["lean", "fused"]) -> Iterator[None]:
    """Inside, ``impl="auto"``, which is what networks ask for, means ``impl`` wherever it applies.

    Without it that is "fused" on a GPU where `proof` passed, and "lean" elsewhere. With "fused" this library's ResNets
    run every norm, activation, gate and addition in Triton kernels. To choose the lean passes on a GPU:

    >>> import ecanet
    >>> from ecanet import ops
    >>> model = ecanet.create_model("resnet8")
    >>> with ops.prefer_impl("lean"):
    ...     tuple(model(torch.randn(2, 3, 32, 32)).shape)
    (2, 1000)

    It holds for every thread, and must enclose the backward too where activations are computed again (checkpointing).

    Raises:
        ConfigError: ``impl`` is neither.
    """
    if impl not in ("lean", "fused"):
        raise ConfigError(f"prefer_impl() takes 'lean' or 'fused', got {impl!r}")
    request = object(), impl
    _requests.append(request)
    try:
        yield
    finally:
        _requests.remove(request)


def requested_impl() -> Literal["lean", "fused"] | None:
    """What `prefer_impl` asks for now."""
    return _requests[-1][1] if _requests else None


def uses_kernels(x: Tensor) -> bool:
    """Whether ``impl="auto"`` means "fused" for ``x``."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return False
    if _requests:
        return requested_impl() == "fused"
    plain = type(x) in (Tensor, nn.Parameter)  # a subclass, fake tensors too, may want to see operations
    return plain and x.dtype in proof.DTYPES and runs_on_gpu(x) and proof.is_proven(x.device, x.dtype)


def runs_on_gpu(x: Tensor) -> bool:
    """Whether ``x`` lies where the kernels are meant to run."""
    return x.is_cuda


def squeeze_scale(x: Tensor, gate: Gate, *, mask: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """``x * gate(mean(x))`` over the spatial axes of ``x`` (N, C, ...); see `reference.squeeze_scale`.

    Raises:
        ConfigError: ``impl`` is unknown or does not apply, ``x`` is not a float tensor of 2 to 5 axes, or ``mask``
            does not fit it.
    """
    if is_traced(x):  # its rank and dtype are not known
        return reference.squeeze_scale(x, gate, mask)
    check_input(x, mask)
    passes = choose(impl, x, "a mask needs it" if mask is not None else None)
    if passes is None:
        return reference.squeeze_scale(x, gate, mask)
    return tail.squeeze_scale(make_dense(x), gate, passes)


def residual_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None = None,
    shortcut: Tensor | None = None,
    shortcut_norm: nn.Module | None = None,
    activation: Activation = "relu",
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``act(b * gate(mean(b)) + shortcut)`` with ``b = norm(z)``; see `reference.residual_tail`.

    ``norm`` and ``shortcut_norm`` are batch norms (synchronised and frozen ones too), whose running statistics are
    updated in training as their own forward does. Any other norm takes the reference.

    Raises:
        ConfigError: ``impl`` is unknown or does not apply, or shapes do not fit.
    """
    return residual_tail_pair(z, norm, gate, shortcut, shortcut_norm, activation, impl=impl, second_output=False)[0]


def residual_tail_pair(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None = None,
    shortcut: Tensor | None = None,
    shortcut_norm: nn.Module | None = None,
    activation: Activation = "relu",
    *,
    impl: Impl = "auto",
    second_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """`residual_tail`'s output two times, for the next block's branch and for its shortcut.

    The two are one tensor with an edge to the backward each, so that their gradients are added inside its first pass
    over memory. Each has only its own way's gradient: give them to nobody who might ask for the whole of it. Where the
    reference runs, without a shortcut, or with ``second_output`` false, they are the same object.

    Raises:
        ConfigError: as `residual_tail`.
    """
    check_input(z, None)
    if shortcut is not None and shortcut.shape != z.shape:
        raise ConfigError(f"the shortcut has shape {tuple(shortcut.shape)}, the branch {tuple(z.shape)}")
    if activation not in ("relu", "relu6", None):
        raise ConfigError(f"unknown activation {activation!r}; choose 'relu', 'relu6' or None")
    obstacle = _obstacle(norm) or (None if shortcut_norm is None else _obstacle(shortcut_norm))
    if shortcut is not None and shortcut.dtype != z.dtype:
        obstacle = f"a {z.dtype} branch and a {shortcut.dtype} shortcut need it"
    passes = choose(impl, z, obstacle)
    if passes is not None:
        z = make_dense(z)
        shortcut = None if shortcut is None else make_dense(shortcut, z)
    if impl == "auto" and passes is lean:
        # measured: without a gate PyTorch's own batch norm needs no help, and with frozen statistics only the gate does
        if gate is None:
            passes = None
        elif not tail.uses_batch_statistics(norm) and z.dtype == reference.accumulation_dtype(z.dtype):
            y = lean.evaluated_tail(z, norm, gate, shortcut, shortcut_norm, activation)
            return y, y
    if passes is None:
        y = reference.residual_tail(z, norm, gate, shortcut, shortcut_norm, activation)
        return y, y
    return tail.residual_tail(z, norm, gate, shortcut, shortcut_norm, activation, passes, second_output)


def choose(impl: Impl, x: Tensor, obstacle: str | None = None) -> Passes | None:
    """The passes that ``impl`` means for ``x``, None for the reference; ``obstacle`` says why only that would do.

    Raises:
        ConfigError: ``impl`` is unknown, or does not apply.
    """
    if impl not in ("auto", "reference", "lean", "fused"):
        raise ConfigError(f"unknown impl {impl!r}; choose 'auto', 'reference', 'lean' or 'fused'")
    if impl == "reference":
        return None
    obstacle = obstacle or find_mode_obstacle(x)
    if impl == "auto":
        if obstacle or torch.compiler.is_compiling() or x.device.type == "meta":
            return None
        impl = "fused" if uses_kernels(x) else "lean"
    if obstacle:
        raise ConfigError(f"impl={impl!r} does not apply: {obstacle}; use impl='reference'")
    if impl == "lean":
        return cast(Passes, lean)
    from ecanet.ops.triton import launch as fused  # Triton is optional and slow to import

    fused.check(x)
    return cast(Passes, fused)


def list_implementations() -> tuple[Passes, ...]:
    """Return every implementation of the passes that can be imported: `lean`, and the Triton kernels."""
    try:
        from ecanet.ops.triton import launch
    except ImportError:
        return (cast(Passes, lean),)
    return cast(Passes, lean), cast(Passes, launch)


def expand(
    h: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor | None, shortcut: Tensor | None, activation: Activation
) -> Tensor:
    """Run a last 1x1 convolution with gate, addition and activation in one Triton kernel: see `triton.expansion`."""
    from ecanet.ops.triton import expansion  # Triton is optional and slow to import

    return expansion.expand(h, weight, bias, g, shortcut, activation)


def find_mode_obstacle(x: Tensor) -> str | None:
    """What rules out our own backward passes here, if anything does."""
    if torch.compiler.is_exporting():
        return "an exported graph consists of PyTorch's operations"
    if torch.compiler.is_compiling():
        return None
    if is_jit_tracing():
        return "a traced graph consists of PyTorch's operations"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need operations they know"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation needs operations that know it"
    return None


def _obstacle(norm: nn.Module) -> str | None:
    """Why the norm must be called as a module, if it must: it is no batch norm, or something listens to it."""
    if type(norm) not in KNOWN_NORMS and not is_frozen_norm(norm):
        return f"{type(norm).__name__} is not a batch norm it knows"
    if must_be_called(norm) or not has_original_forward(norm):
        return "the norm has hooks or another forward"
    return None


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` is torchvision's frozen batch norm, which need not be installed. Others have its name, too."""
    return type(norm).__name__ == "FrozenBatchNorm2d" and type(norm).__module__ == "torchvision.ops.misc"


def make_dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x`` contiguous or channels-last (as ``like`` is, where given); itself if it is already."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like is not None:
        last = x.dim() in formats and not like.is_contiguous()
        return x.contiguous(memory_format=formats[x.dim()]) if last else x.contiguous()
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return x
    return x.contiguous()


def check_input(x: Tensor, mask: Tensor | None) -> None:
    """Raise ConfigError unless ``x`` is (N, C[, L | H, W | D, H, W]) and ``mask`` is its boolean (N[, ...])."""
    if not 2 <= x.dim() <= 5:
        raise ConfigError(f"expected (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ConfigError(f"expected a floating-point tensor, got {x.dtype}; convert it with x.float()")
    if mask is None:
        return
    if x.dim() == 2:
        raise ConfigError("mask= needs spatial axes to mask, but the input is (N, C)")
    expected = (x.shape[0], *x.shape[2:])
    if mask.shape != expected:
        raise ConfigError(f"mask must have shape {expected} for input {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ConfigError(f"mask must be boolean (True = counts), got {mask.dtype}")
