"""Choose the implementation of an operation.

- ``impl="reference"`` is plain PyTorch (`reference`, the specification).
- ``impl="lean"`` takes fewer passes over memory in PyTorch operations, on any device.
- ``impl="fused"`` takes the fewest, in Triton kernels on a CUDA device.
- ``impl="auto"`` is fused on a GPU where the kernels have passed their proof (`proof`; a failed proof warns) and the
  work is not too small (`SMALL`), and lean elsewhere. It is the reference where neither applies: with a mask, under
  export, forward-mode differentiation and `torch.func`, and under `torch.compile`, which fuses the reference itself
  (but see `compiles_to_kernels`).

Networks use "auto"; `prefer_impl` changes its meaning for whole networks. An explicit choice is never replaced by
another: it raises where it does not apply.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ecanet.errors import ConfigError
from ecanet.ops import lean, proof, reference, tail
from ecanet.ops.calls import find_norm_obstacle
from ecanet.ops.channel_gates import ChannelGate
from ecanet.ops.inputs import check_input, make_dense
from ecanet.ops.passes import Passes
from ecanet.ops.reference import Activation, Gate
from ecanet.ops.tracing import is_exporting, is_jit_tracing, is_traced

__all__ = ["Activation", "Gate", "Impl", "prefer_impl", "residual_tail", "residual_tail_pair", "squeeze_scale"]

Impl = Literal["auto", "reference", "lean", "fused"]

SMALL = 2**22
"""Elements of a tensor below which "auto" runs a norm without a gate by PyTorch's operations, in evaluation.

The kernels save bytes and cost Python. Counted for ResNet-50 in evaluation (`tests/python_time.py`, no GPU): 5.1 ms a
batch by kernels and 3.7 ms by PyTorch's operations, 26 us for each of 53 norms. A kernel saves at least two passes, in
16 bits 4 bytes an element: 1.4 us for a million elements at 3 TB/s, and no time at all while Python is what the GPU
waits for. An estimate: at 20,000 images/s a norm and its convolution take 0.9 us an image, of 210,000 elements on
average, so that Python's 97 us for a norm are hidden from 20 million elements on. The number is lower, so that a batch
of 256 images takes the kernels everywhere: its smallest tensor has 6.4 million. A batch of 5 takes them nowhere.

With a gate (16 in the network: 5.2 ms by kernels, 12.6 by the lean passes) and in training (14.6 and 14.5 ms, with
gates 16.2 and 45.0) the kernels cost no more Python, so they always run.
"""

_requests: list[tuple[object, Literal["lean", "fused"]]] = []
"""The requests of the open `prefer_impl` blocks; the last one counts.

They are shared by all threads, because checkpointed activations are recomputed in autograd's threads.
"""


@contextmanager
def prefer_impl(impl: Literal["lean", "fused"]) -> Generator[None, None, None]:
    """Make ``impl="auto"``, which networks use, mean ``impl`` wherever it applies.

    By default "auto" means "fused" on a GPU where `proof` passed, and "lean" elsewhere. With "fused" this library's
    ResNets run every norm, activation, gate and addition in Triton kernels. To use the lean passes on a GPU:

    >>> import ecanet
    >>> from ecanet import ops
    >>> model = ecanet.create_model("resnet8")
    >>> with ops.prefer_impl("lean"):
    ...     tuple(model(torch.randn(2, 3, 32, 32)).shape)
    (2, 1000)

    The choice holds for all threads. With activation checkpointing it must enclose the backward too, which recomputes
    the activations.

    Raises:
        ConfigError: ``impl`` is neither.
    """
    if impl not in ("lean", "fused"):
        raise ConfigError(f"prefer_impl() takes 'lean' or 'fused', got {impl!r}")
    request = object(), impl  # the object tells equal requests apart, since blocks may end in any order
    _requests.append(request)
    try:
        yield
    finally:
        _requests.remove(request)


def get_requested_impl() -> Literal["lean", "fused"] | None:
    """Return the implementation that the innermost open `prefer_impl` block requests, None outside of any."""
    return _requests[-1][1] if _requests else None


def uses_kernels(x: Tensor, gated: bool = False) -> bool:
    """Return whether ``impl="auto"`` means "fused" for a norm of ``x``, with a gate after it if ``gated``."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return False
    if _requests:
        return get_requested_impl() == "fused"
    # Subclasses (fake tensors too) may need to see PyTorch's operations, and a tracer's stand-in has no size.
    if type(x) not in (Tensor, nn.Parameter):
        return False
    if not gated and x.numel() < SMALL and not torch.is_grad_enabled():
        return False
    return x.dtype in proof.DTYPES and runs_on_gpu(x) and proof.is_proven(x.device, x.dtype)


def compiles_to_kernels(x: Tensor) -> bool:
    """Return whether tails of ``x`` are the kernels' operators in a graph of `torch.compile` for training.

    There the compiler moves more bytes than the kernels do. In evaluation it moves as many.
    """
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled() or find_mode_obstacle() is not None:
        return False
    if _requests:
        return get_requested_impl() == "fused"
    return x.dtype in proof.DTYPES and runs_on_gpu(x) and _are_operators_proven(x.device, x.dtype)


def _are_operators_proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels passed their proof. The compiler calls this while it traces, and keeps the answer."""
    return proof.is_proven(device, dtype, "operators")


# What `torch.compiler.assume_constant_result` sets. Called here, it would import the compiler along with this library.
_are_operators_proven._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def runs_on_gpu(x: Tensor) -> bool:
    """Return whether ``x`` is on a device for which the kernels are made."""
    return x.is_cuda


def squeeze_scale(x: Tensor, gate: Gate, *, mask: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Return ``x * gate(mean(x))`` over the spatial axes of ``x`` (N, C, ...); see `reference.squeeze_scale`.

    Raises:
        ConfigError: ``impl`` is unknown or does not apply, ``x`` is not a float tensor of 2 to 5 axes, or ``mask``
            does not fit ``x``.
    """
    if is_traced(x):  # its rank and dtype are not known
        return reference.squeeze_scale(x, gate, mask)
    check_input(x, mask)
    if impl == "auto" and prefers_plain_scale(x, gate):
        return reference.squeeze_scale(x, gate, mask)
    passes = choose(impl, x, "a mask needs the reference" if mask is not None else None, gated=True)
    if passes is None:
        return reference.squeeze_scale(x, gate, mask)
    return tail.squeeze_scale(make_dense(x), gate, passes)


def prefers_plain_scale(x: Tensor, gate: Gate) -> bool:
    """Return whether PyTorch's operations are at least as fast as the lean passes for ``x * gate(mean(x))``.

    By measurement they are without gradients, and for small tensors. In 16 bits they round once more.
    """
    if runs_on_gpu(x) or isinstance(gate, reference.MomentsGate) or get_requested_impl() is not None:
        return False
    is_wide = x.dtype == reference.accumulation_dtype(x.dtype)
    return is_wide and (not torch.is_grad_enabled() or x.numel() < lean.SMALL_SCALE)


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
    """Return ``act(b * gate(mean(b)) + shortcut)`` with ``b = norm(z)``; see `reference.residual_tail`.

    ``z`` and ``shortcut`` are (N, C, ...), and so is the result. ``norm`` and ``shortcut_norm`` are batch norms,
    synchronised and frozen ones included; in training their running statistics are updated as by their own forward.
    Any other norm takes the reference.

    Raises:
        ConfigError: ``impl`` or ``activation`` is unknown, ``impl`` does not apply, or shapes do not fit.
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
    """Return `residual_tail`'s output twice, as two outputs of one autograd node.

    One is for the next block's branch, one for its shortcut. Each output carries only one path's gradient, so do not
    expose them to hooks. The two gradients are added inside the node's first pass over memory; for a single output
    autograd adds them in three passes of its own. The outputs share their memory. Without a shortcut, with
    ``second_output`` false and where the reference runs, they are the same object, which carries the whole gradient.

    Raises:
        ConfigError: See `residual_tail`.
    """
    check_input(z, None)
    if shortcut is not None and shortcut.shape != z.shape:
        raise ConfigError(f"shortcut must have the branch's shape {tuple(z.shape)}, got {tuple(shortcut.shape)}")
    if activation not in ("relu", "relu6", None):
        raise ConfigError(f"unknown activation {activation!r}; choose 'relu', 'relu6' or None")
    obstacle = find_norm_obstacle(norm) or (None if shortcut_norm is None else find_norm_obstacle(shortcut_norm))
    if shortcut is not None and shortcut.dtype != z.dtype:
        obstacle = f"a {z.dtype} branch with a {shortcut.dtype} shortcut needs the reference"
    if impl == "auto" and not obstacle and compiles_to_kernels(z) and tail.uses_batch_statistics(norm):
        # PyTorch's own all-reduce for autograd cannot be compiled, its synchronised norm can
        impl = "reference" if isinstance(norm, nn.SyncBatchNorm) else "fused"
    passes = choose(impl, z, obstacle, gated=gate is not None)
    if passes is not None:
        z = make_dense(z)
        shortcut = None if shortcut is None else make_dense(shortcut, z)
    if impl == "auto" and passes is lean:
        if gate is None:  # by measurement PyTorch's own batch norm is as fast
            y = lean.compute_plain_tail(z, norm, shortcut, shortcut_norm, activation)
            return y, y
        if prefers_plain_norm(z, norm, gate):
            y = lean.compute_gated_tail(z, norm, gate, shortcut, shortcut_norm, activation)
            return y, y
    if passes is None:
        y = reference.residual_tail(z, norm, gate, shortcut, shortcut_norm, activation)
        return y, y
    return tail.residual_tail(z, norm, gate, shortcut, shortcut_norm, activation, passes, second_output)


def prefers_plain_norm(z: Tensor, norm: nn.Module, gate: Gate) -> bool:
    """Return whether PyTorch's ``norm``, before gate and addition in one pass, is as fast as the lean passes.

    By measurement it is with frozen statistics, and for gates that read moments of small tensors. Elsewhere it does not
    compute the same: for a norm over several processes, an empty batch, one value per channel, and in 16 bits, where it
    rounds once more.
    """
    if z.dtype != reference.accumulation_dtype(z.dtype):
        return False
    if not tail.uses_batch_statistics(norm):
        return True
    if not isinstance(gate, reference.MomentsGate) or get_requested_impl() is not None:
        return False
    return z.shape[1] < z.numel() < lean.SMALL and tail.find_sync_group(norm) is None


def choose(impl: Impl, x: Tensor, obstacle: str | None = None, *, gated: bool = False) -> Passes | None:
    """Return the passes that ``impl`` means for ``x``, None for the reference.

    ``obstacle`` is a reason why only the reference applies, if the caller knows one. ``gated`` tells of a gate.

    Raises:
        ConfigError: ``impl`` is unknown or does not apply.
    """
    if impl not in ("auto", "reference", "lean", "fused"):
        raise ConfigError(f"unknown impl {impl!r}; choose 'auto', 'reference', 'lean' or 'fused'")
    if impl == "reference":
        return None
    obstacle = obstacle or find_mode_obstacle()
    if impl == "auto":
        if obstacle or torch.compiler.is_compiling() or x.device.type == "meta":
            return None
        impl = "fused" if uses_kernels(x, gated) else "lean"
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
    h: Tensor, weight: Tensor, bias: Tensor | None, g: Tensor | None, shortcut: Tensor | None, activation: Activation,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run a block's last 1x1 convolution with gate, addition and activation in one Triton kernel.

    See `triton.expansion.expand` for the equation, shapes and errors.
    """
    from ecanet.ops.triton import expansion  # Triton is optional and slow to import

    return expansion.expand(h, weight, bias, g, shortcut, activation, offset)


def predict_gate(m: Tensor, weight: Tensor, bias: Tensor | None, form: ChannelGate) -> Tensor:
    """Compute a gate's factors from the means of its 1x1 convolution's input in one Triton kernel.

    See `triton.predicted_gates.predict_gate` for the equation, shapes, dtypes and errors.
    """
    from ecanet.ops.triton import predicted_gates  # Triton is optional and slow to import

    return predicted_gates.predict_gate(m, weight, bias, form)


def find_mode_obstacle() -> str | None:
    """Return why the current mode (export, tracing, transforms) rules out our backward passes, None if it does not."""
    if is_exporting():
        return "an exported graph consists of PyTorch's operations"
    if torch.compiler.is_compiling():
        return None
    if is_jit_tracing():
        return "a traced graph consists of PyTorch's operations"
    if get_proxy_mode() is not None:
        return "make_fx records PyTorch's operations, and those with out= have no gradients"
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return "torch.func transforms support PyTorch's operations only"
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
        return "forward-mode differentiation supports PyTorch's operations only"
    return None
