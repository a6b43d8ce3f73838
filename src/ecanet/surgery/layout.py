"""Apply a gate to a tensor, in the tensor's own memory layout forward and backward."""

import torch
from torch import Tensor, fx, nn

from ecanet.attention import Attention


def apply_gate(gate: nn.Module, x: Tensor, axis: int) -> Tensor:
    """Return ``gate(x)``, with the channels of ``x`` on ``axis``, in the memory layout of ``x``.

    A gate whose weights fit any width follows a network that was pruned.
    """
    traced = isinstance(x, fx.Proxy)
    if isinstance(gate, Attention) and gate.fits_any_width and not traced and gate.channels != x.shape[axis]:
        gate.channels = x.shape[axis]
    y: Tensor = gate(x if axis == 1 else x.movedim(axis, 1))
    # A view makes a later in-place addition slower, so there is none for channels on axis 1.
    if axis != 1:
        y = y.movedim(1, axis)
    if torch.compiler.is_compiling() or traced:
        return y
    if y.stride() != x.stride():
        y = torch.empty_like(x).copy_(y)
    if y.requires_grad and x.requires_grad:
        keep_layout(x, y)
        # An in-place addition to a view hands on its gradient in the layout of the tensor behind the view.
        if x._is_view() and not y._is_view():
            y = y.view_as(y)
    return y


def keep_layout(x: Tensor, y: Tensor) -> None:
    """Give the gradient of ``x`` the memory layout of the gradient of ``y``, as if there were no gate between them.

    Layers before may sum the gradient in memory order. With the same layout, their parameters' gradients are equal to
    the plain network's in the last bit.
    """
    strides: list[tuple[int, ...]] = []

    def note(gradient: Tensor) -> None:
        strides.append(gradient.stride())

    def restore(gradient: Tensor) -> Tensor | None:
        if not strides or gradient.stride() == strides[-1] or 0 in strides[-1]:
            return None
        return torch.empty_strided(gradient.shape, strides[-1], dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )

    for tensor, hook in ((y, note), (x, restore)):
        tensor.register_hook(hook)  # pyright: ignore[reportUnknownMemberType]
