"""One error budget: a result may be as far from a float64 oracle as its own rounding explains.

The tests, the proof of the kernels on a device and the check before a benchmark all judge results by these functions.
They derive a bound in one of three ways:

- `find_excess` bounds the largest error of a tensor by the error of a reference that computes in the same dtype.
- `bound_sums` bounds each element of sums that run in float32 and are rounded once; `find_elementwise_excess` judges.
- `bound_relative_error` bounds norms, for networks and other long computations; `describe_excess` judges.

Whatever the way, NaN, infinity and a wrong shape are errors, and empty tensors agree.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "assert_within_budget",
    "bound_relative_error",
    "bound_sums",
    "describe_excess",
    "find_elementwise_excess",
    "find_excess",
    "measure_relative_error",
]


def describe_excess(name: str, error: float, allowed: float) -> str | None:
    """Return a sentence about an ``error`` that is larger than ``allowed``, None if it is not.

    NaN is an excess. So is any error beside an infinite bound: it comes from a reference that overflowed.

    >>> describe_excess("dz", 2e-6, 1e-6)
    'dz is off by 2.00e-06, allowed 1.00e-06'
    """
    if error <= allowed < math.inf:
        return None
    return f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def find_excess(
    name: str, actual: Tensor, reference: Tensor, oracle: Tensor, *, roundings: float = 1, magnitude: float = 0
) -> str | None:
    """Return what is wrong with ``actual``, None if nothing is.

    It may err at most twice as much as ``reference``, which is computed in the same dtype by plain arithmetic, and by
    some roundings to that dtype: ``max |actual - oracle| <= 2 (max |reference - oracle| + roundings eps size)`` with
    ``size = max(magnitude, max |oracle|)``. The factor 2 lets errors of both signs meet.

    Args:
        name: Of the result, for the message.
        oracle: The same result, computed in float64.
        roundings: One is that of the output. The sum of n terms in another order differs by about ``sqrt(n)`` more.
            In float64 there is no wider oracle: pass the number of terms summed.
        magnitude: The largest term, where a sum can cancel: its rounding error is that of its terms.
    """
    mismatch = _find_mismatch(name, actual, oracle)
    if mismatch is not None or not oracle.numel():
        return mismatch
    size = max(magnitude, _largest(oracle.double()))
    rounding = roundings * torch.finfo(actual.dtype).eps * size
    allowed = 2 * (_largest(reference.double() - oracle) + rounding)
    return describe_excess(name, _largest(actual.double() - oracle), allowed)


def assert_within_budget(
    name: str, actual: Tensor, reference: Tensor, oracle: Tensor, *, roundings: float = 1, magnitude: float = 0
) -> None:
    """Raise AssertionError if `find_excess` finds one."""
    excess = find_excess(name, actual, reference, oracle, roundings=roundings, magnitude=magnitude)
    if excess is not None:
        raise AssertionError(excess)


def bound_sums(
    oracle: Tensor, terms: Tensor, roundings: float, dtype: torch.dtype, *, truncates: bool = False
) -> Tensor:
    """Return how far each element may be from ``oracle`` if it is summed in float32 and rounded to ``dtype`` once.

    Args:
        terms: Sums of the absolute values of what is summed, of ``oracle``'s shape and in float64.
        roundings: How many float32 eps of ``terms`` a sum may lose. To round to nearest loses half an eps.
        truncates: The last step cuts digits off and does not round to nearest, which loses a whole eps.
    """
    limits = torch.finfo(dtype)
    unit = limits.eps if truncates else limits.eps / 2
    slack = roundings * torch.finfo(torch.float32).eps * terms
    return slack + unit * (oracle.abs() + slack) + limits.eps * limits.smallest_normal  # the last for subnormal numbers


def find_elementwise_excess(name: str, actual: Tensor, oracle: Tensor, allowed: Tensor) -> str | None:
    """Return by how much ``actual`` is wrong where it exceeds ``allowed`` most, None if it does nowhere."""
    mismatch = _find_mismatch(name, actual, oracle)
    if mismatch is not None or not oracle.numel():
        return mismatch
    error = (actual.double() - oracle).abs()
    exceeds = ~((error <= allowed) & (allowed < math.inf))  # negated, so that NaN exceeds too
    if not bool(exceeds.any()):
        return None
    worst = torch.where(exceeds, error / allowed, -1).argmax()
    return describe_excess(name, float(error.flatten()[worst]), float(allowed.flatten()[worst]))


def measure_relative_error(actual: Iterable[Tensor], oracle: Iterable[Tensor]) -> float:
    """Return the largest ``|actual - oracle| / |oracle|`` (2-norms) of several tensors.

    NaN if any of them is NaN, infinity if a shape differs.

    Raises:
        ValueError: There are more tensors of one than of the other.
    """
    errors = [_relative_error(x, y) for x, y in zip(actual, oracle, strict=True)]
    return float(torch.tensor([0.0, *errors], dtype=torch.float64, device="cpu").max())  # Python's max passes over NaN


def bound_relative_error(reference: Iterable[Tensor], oracle: Iterable[Tensor], dtype: torch.dtype) -> float:
    """Return the relative error allowed beside a ``reference`` in ``dtype``: ``4 (its own error + 2 eps)``."""
    return 4 * (measure_relative_error(reference, oracle) + 2 * torch.finfo(dtype).eps)


def _find_mismatch(name: str, actual: Tensor, oracle: Tensor) -> str | None:
    if actual.shape != oracle.shape:
        return f"{name} has shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    return None if bool(actual.isfinite().all()) else f"{name} is not finite"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _relative_error(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return math.inf
    error, size = (float(t.square().sum().sqrt()) for t in (x.double() - y.double(), y.double()))
    return error / max(size, 1e-30)
