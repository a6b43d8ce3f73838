"""A convolution with its bias, an addition and ReLU in its epilogue: ``relu(convolution(x) + bias + shortcut)``.

PyTorch's convolution on a GPU adds the bias in a pass of its own, and addition and ReLU are two more. cuDNN has all of
it in one kernel, of which this is known:

- It may be many times slower, for example for large windows and few channels
  (https://github.com/pytorch/pytorch/issues/68506), and cuDNN refuses some forms
  (https://github.com/pytorch/pytorch/issues/62926).
- cuDNN's ReLU need not pass NaN on, which PyTorch's does. A NaN that becomes 0 would hide that a network is broken.
- Its algorithm may be one whose result differs from run to run.

Where it is not used, a Triton kernel adds and applies ReLU in one pass behind the convolution, and keeps NaN. Each form
is tried for each kind of convolution, and runs only where it is right and faster than PyTorch's operations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ecanet.errors import summarize
from ecanet.ops import choices, proof
from ecanet.ops.inputs import make_dense
from ecanet.testing import find_excess

__all__ = ["Geometry", "convolve_relu", "has_epilogues"]

TF32_ROUNDINGS = 2.0**13
"""Roundings of float32 in one of TF32, which has 13 bits less."""


class Geometry(NamedTuple):
    """How a window moves over the input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Operands(NamedTuple):
    """The tensors of a convolution."""

    x: Tensor  # N K H W
    weight: Tensor  # C K/groups h w
    bias: Tensor | None  # C
    shortcut: Tensor | None  # N C H' W'


Form = Callable[[Operands, Geometry], Tensor]


def has_epilogues() -> bool:
    """Return whether cuDNN's kernel may be used as PyTorch is set: deterministic algorithms may be asked for.

    A dispatch mode, such as `FlopCounterMode`, shall see PyTorch's convolution, which it knows.
    """
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    modes = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    return cudnn.enabled and not deterministic and modes == 0


def convolve_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, geometry: Geometry
) -> Tensor | None:
    """Return ``relu(convolution(x) + bias + shortcut)`` in fewer passes, None where PyTorch's operations shall run.

    ``x`` (N, K, H, W) is on a CUDA device and not empty; ``weight``, ``bias`` and ``shortcut``, which has the result's
    shape, have its dtype. There is no gradient.
    """
    given = Operands(x, weight, bias, shortcut)
    kind = describe_kind(given, geometry)
    if choices.is_chosen(x.device, x.dtype, kind, lambda: try_form(run_operator, given, geometry)):
        try:
            return run_operator(given, geometry)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refused:  # cuDNN has a kernel for another input of about this size, not for this one
            choices.reject(x.device, x.dtype, kind, f"it does not run: {summarize(refused)}")
    if not proof.is_proven(x.device, x.dtype):
        return None
    kind = "one pass", *kind
    if choices.is_chosen(x.device, x.dtype, kind, lambda: try_form(run_with_one_pass, given, geometry)):
        return run_with_one_pass(given, geometry)
    return None


def describe_kind(given: Operands, geometry: Geometry) -> tuple[object, ...]:
    """Return all that the choice depends on. The number of positions counts in octaves.

    So inputs of many sizes share a choice, and images of ever new sizes are not a trial each.
    """
    x, weight, bias, shortcut = given
    octave = (x.numel() // x.shape[1]).bit_length()
    last = x.is_contiguous(memory_format=torch.channels_last)
    cudnn = torch.backends.cudnn
    settings = cudnn.version(), cudnn.benchmark, x.dtype == torch.float32 and rounds_to_tf32()
    shape = "convolution", *weight.shape, *geometry, bias is not None, shortcut is not None
    return *shape, octave, last, *settings


def rounds_to_tf32() -> bool:
    """Return whether PyTorch's convolutions on a GPU may round float32 inputs to TF32, which is its default."""
    # `cudnn.conv` is unknown to type checkers
    return getattr(getattr(torch.backends.cudnn, "conv"), "fp32_precision") == "tf32"  # noqa: B009


def run_operator(given: Operands, geometry: Geometry) -> Tensor:
    """Return the result by cuDNN's kernel."""
    x, weight, bias, shortcut = given
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)


def run_with_one_pass(given: Operands, geometry: Geometry) -> Tensor:
    """Return the result by PyTorch's convolution without bias, and one Triton kernel for what follows it."""
    from ecanet.ops.triton import launch  # Triton is optional and slow to import

    x, weight, bias, shortcut = given
    y = make_dense(F.conv2d(x, weight, None, *geometry))
    return launch.finish_in_place(y, bias, None if shortcut is None else make_dense(shortcut, y))


def run_plain(given: Operands, geometry: Geometry) -> Tensor:
    """Return the result by PyTorch's operations."""
    x, weight, bias, shortcut = given
    y = F.conv2d(x, weight, bias, *geometry)
    return (y if shortcut is None else y.add_(shortcut)).relu_()


# the trial


def try_form(form: Form, given: Operands, geometry: Geometry) -> str:
    """Return `choices.FASTER`, or why ``form`` shall not run for operands like ``given``."""
    sample = draw_sample(given)
    return find_fault(form, sample, geometry) or choices.compare_forms(
        given.x.device, lambda: form(sample, geometry), lambda: run_plain(sample, geometry)
    )


def draw_sample(given: Operands) -> Operands:
    """Return random operands of the same shapes and layouts: those of a network may be 0, or not finite.

    They come from a generator of their own, so that the global random state is unchanged.
    """
    generator = torch.Generator(given.x.device).manual_seed(0)

    def draw(like: Tensor, scale: float = 1) -> Tensor:
        return torch.empty_like(like).normal_(0, scale, generator=generator)

    x, weight, bias, shortcut = given
    terms = weight[0].numel()
    return Operands(
        draw(x), draw(weight, terms**-0.5), None if bias is None else draw(bias),
        None if shortcut is None else draw(shortcut),
    )  # fmt: skip


def find_fault(form: Form, sample: Operands, geometry: Geometry) -> str | None:
    """Return how ``form`` is wrong for ``sample``, None if it is not: its values, or that it loses a NaN.

    The first and the last image are compared with float64, which would take too much memory for all.
    """
    actual, plain = form(sample, geometry), run_plain(sample, geometry)
    if actual.shape != plain.shape or actual.dtype != plain.dtype:
        return f"it returns {tuple(actual.shape)} in {actual.dtype}"
    exact = run_plain(widen_ends(sample), geometry)
    tf32 = sample.x.dtype == torch.float32 and rounds_to_tf32()
    ends = actual[[0, -1]], plain[[0, -1]]
    excess = find_excess("it", *ends, exact, roundings=TF32_ROUNDINGS if tf32 else 2)
    if excess is not None:
        return excess
    _, _, height, width = sample.x.shape
    sample.x[0, 0, height // 2, width // 2] = float("nan")
    spoilt, exact = form(sample, geometry)[[0, -1]], run_plain(widen_ends(sample), geometry)
    sample.x[0, 0, height // 2, width // 2] = 0
    return "it turns NaN into a number" if bool((exact.isnan() & ~spoilt.isnan()).any()) else None


def widen_ends(given: Operands) -> Operands:
    """Return the operands of the first and the last image in float64."""
    x, weight, bias, shortcut = given
    return Operands(
        x[[0, -1]].double(), weight.double(), None if bias is None else bias.double(),
        None if shortcut is None else shortcut[[0, -1]].double(),
    )  # fmt: skip
