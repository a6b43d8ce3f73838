"""Compare the outputs of two runs bit for bit, and say where numbers are missing in them."""

from typing import NoReturn

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError
from ecanet.surgery.recording import iterate_tensors
from ecanet.surgery.state import are_equal

REMEDY = (
    "Mend the weights, pass example= with an input that the network answers with numbers, or verify=False to attach "
    "without the proof"
)


def are_same(a: object, b: object) -> bool:
    """Return whether two outputs hold the same tensors bit for bit; tensors without data have equal shapes only."""
    left, right = list(iterate_tensors(a)), list(iterate_tensors(b))
    return len(left) == len(right) and all(map(are_same_tensors, left, right))


def are_same_tensors(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same bit for bit; not-a-number equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or are_equal(a, b)


def check_has_numbers(model: nn.Module, output: object) -> None:
    """Check that the output of the plain network holds a number, because NaN beside NaN proves nothing.

    Raises:
        AttachError: every floating-point value in it is NaN.
    """
    tensors = [t for t in iterate_tensors(output) if has_values(t)]
    if tensors and all(bool(t.isnan().all()) for t in tensors):
        raise AttachError(
            f"the outputs of {type(model).__name__} are NaN without any gate ({describe_missing(model, output)}), so "
            f"nothing can be proven; attach was undone. {REMEDY}"
        )


def refuse_difference(model: nn.Module, plain: object, gated: object) -> NoReturn:
    """Refuse neutral gates that change the outputs, for the reason that holds.

    A gate averages each channel. Where an activation is NaN or infinite, so is its mean, and the gate, which multiplies
    the means of neighbouring channels by 0, passes NaN on to them.

    Raises:
        AttachError: always.
    """
    name = type(model).__name__
    if differ_in_numbers(plain, gated):
        raise AttachError(
            f"the outputs of {name} would change, though every gate is neutral; attach was undone. Choose other "
            f"modules with where=, or pass preserve=False"
        )
    if found := describe_missing(model, plain):
        raise AttachError(
            f"the outputs of {name} are not all numbers without any gate ({found}), and gates would spread NaN to more "
            f"of them; attach was undone. {REMEDY}"
        )
    raise AttachError(
        f"the outputs of {name} would become NaN ({describe_missing(model, gated)}), because activations on the "
        f"example are infinite or NaN, though the outputs are not; attach was undone. {REMEDY}"
    )


def differ_in_numbers(a: object, b: object) -> bool:
    """Return whether two outputs differ in more than NaN and infinity: in a finite value, a shape or a dtype."""
    left, right = list(iterate_tensors(a)), list(iterate_tensors(b))
    if len(left) != len(right):
        return True
    for one, other in zip(left, right, strict=True):
        if are_same_tensors(one, other):
            continue
        if one.shape != other.shape or one.dtype != other.dtype or not has_values(one):
            return True
        both = one.isfinite() & other.isfinite()
        if not torch.equal(one[both], other[both]):
            return True
    return False


def describe_missing(model: nn.Module, output: object) -> str:
    """Return which output holds how many NaN or infinite values, and the first tensor of ``model`` with NaN; or ""."""
    tensors = list(iterate_tensors(output))
    parts: list[str] = []
    for position, tensor in enumerate(tensors, 1):
        if has_values(tensor):
            counts = (("NaN", tensor.isnan()), ("infinite", tensor.isinf()))
            found = [f"{n} of {tensor.numel()} values are {kind}" for kind, mask in counts if (n := int(mask.sum()))]
            if found:
                parts.append(f"output {position} of {len(tensors)}: {' and '.join(found)}")
    if len(parts) > 2:
        parts[2:] = [f"and {len(parts) - 2} more outputs"]
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = next((name for name, t in held.items() if has_values(t) and bool(t.isnan().any())), None)
    if parts and broken is not None:
        parts.append(f"{broken!r} of the network holds NaN")
    return "; ".join(parts)


def has_values(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has data that may be NaN."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and not (tensor.is_meta or tensor.is_nested) and tensor.numel() > 0
