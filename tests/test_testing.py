"""The error budget itself, with planted errors: a bit too large, NaN, infinite, of another shape."""

import math

import pytest
import torch

from ecanet.testing import (
    assert_within_budget,
    bound_relative_error,
    bound_sums,
    describe_excess,
    find_elementwise_excess,
    find_excess,
    measure_relative_error,
)

EPS = torch.finfo(torch.float32).eps
ORACLE = torch.tensor([[1.0, -4.0], [0.5, 2.0]], dtype=torch.float64)


def with_error(error):
    """The oracle in float32 with ``error`` added to its first element, 1."""
    x = ORACLE.float()
    x[0, 0] += error
    return x


@pytest.mark.parametrize(
    ("reference_error", "options", "allowed"),
    [
        (0, {}, 8 * EPS),  # twice a rounding of 4, the largest element
        (0, {"roundings": 3}, 24 * EPS),
        (0, {"magnitude": 16}, 32 * EPS),
        (0, {"magnitude": 2}, 8 * EPS),
        (32 * EPS, {}, 72 * EPS),
        (-32 * EPS, {}, 72 * EPS),
    ],
)
def test_the_bound_is_met_exactly_and_one_digit_more_exceeds_it(reference_error, options, allowed):
    reference = with_error(reference_error)
    for sign in (-1, 1):
        assert find_excess("y", with_error(sign * allowed), reference, ORACLE, **options) is None
        excess = find_excess("y", with_error(sign * (allowed + EPS)), reference, ORACLE, **options)
        assert excess == f"y is off by {allowed + EPS:.2e}, allowed {allowed:.2e}"


def test_the_rounding_is_that_of_the_results_dtype():
    actual = ORACLE.to(torch.bfloat16)
    actual[0, 1] += 2 * 4 * torch.finfo(torch.bfloat16).eps
    assert find_excess("y", actual, ORACLE.to(torch.bfloat16), ORACLE) is None
    assert find_excess("y", actual.float(), ORACLE.float(), ORACLE) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_not_finite_is_wrong(value):
    actual = with_error(value)
    assert find_excess("y", actual, ORACLE.float(), ORACLE) == "y is not finite"
    assert find_elementwise_excess("y", actual, ORACLE, torch.full_like(ORACLE, 1e9)) == "y is not finite"
    # beside a reference or a bound that says nothing, too
    assert find_excess("y", ORACLE.float(), actual, ORACLE) is not None
    assert find_elementwise_excess("y", ORACLE, ORACLE, torch.full_like(ORACLE, abs(value))) is not None
    assert describe_excess("y", 0, abs(value)) is not None
    assert describe_excess("y", abs(value), 1) is not None


def test_a_result_of_another_shape_is_wrong():
    actual = ORACLE[:1]  # broadcasts
    assert find_excess("y", actual, ORACLE, ORACLE, roundings=1e30) == "y has shape (1, 2), expected (2, 2)"
    assert find_elementwise_excess("y", actual, ORACLE, ORACLE.abs() * 100) == "y has shape (1, 2), expected (2, 2)"
    assert measure_relative_error([actual], [ORACLE]) == math.inf
    with pytest.raises(ValueError, match="shorter"):
        measure_relative_error([ORACLE, ORACLE], [ORACLE])


def test_empty_results_agree_if_they_have_the_shape():
    empty = torch.empty(0, 3, dtype=torch.float64)
    assert find_excess("y", empty, empty, empty) is None
    assert find_elementwise_excess("y", empty, empty, empty) is None
    assert measure_relative_error([empty], [empty]) == measure_relative_error([], []) == 0
    assert find_excess("y", empty.T, empty.T, empty) is not None


def test_assert_within_budget_raises_what_find_excess_finds():
    reference = ORACLE.float()
    assert_within_budget("y", with_error(24 * EPS), reference, ORACLE, roundings=3)
    assert_within_budget("y", with_error(32 * EPS), reference, ORACLE, magnitude=16)
    with pytest.raises(AssertionError, match=r"y is off by 2.98e-06, allowed 9.54e-07"):
        assert_within_budget("y", with_error(25 * EPS), reference, ORACLE)


def test_each_element_has_its_own_bound():
    allowed = torch.tensor([[1e-3, 0.0], [1.0, 2.0]], dtype=torch.float64)
    error = torch.tensor([[1e-3, 0.0], [-1.0, 1.5]], dtype=torch.float64)
    zero = torch.zeros_like(error)
    assert find_elementwise_excess("y", error, zero, allowed) is None
    error[0, 0] *= 1.001
    error[1, 0] = 1.0005
    assert find_elementwise_excess("y", error, zero, allowed) == "y is off by 1.00e-03, allowed 1.00e-03"
    error[0, 1] = 1e-9
    assert find_elementwise_excess("y", error, zero, allowed) == "y is off by 1.00e-09, allowed 0.00e+00"


def test_sums_in_float32_lose_their_roundings_and_then_that_of_the_output():
    oracle, terms = torch.tensor([3.0], dtype=torch.float64), torch.tensor([100.0], dtype=torch.float64)
    limits = torch.finfo(torch.bfloat16)
    slack = 7 * EPS * 100
    least = limits.eps * limits.smallest_normal
    expected = slack + limits.eps / 2 * (3 + slack) + least
    assert float(bound_sums(oracle, terms, 7, torch.bfloat16)) == expected
    assert float(bound_sums(-oracle, terms, 7, torch.bfloat16)) == expected
    truncated = slack + limits.eps * (3 + slack) + least
    assert float(bound_sums(oracle, terms, 7, torch.bfloat16, truncates=True)) == truncated


def test_the_relative_error_is_the_worst_of_all_and_nan_hides_nowhere():
    doubled = [ORACLE, ORACLE * 1.5, ORACLE * 1.25]
    assert measure_relative_error(doubled, [ORACLE] * 3) == 0.5
    for position in range(3):
        broken = [*doubled[:position], ORACLE * math.nan, *doubled[position + 1 :]]
        assert math.isnan(measure_relative_error(broken, [ORACLE] * 3))
    assert bound_relative_error(doubled, [ORACLE] * 3, torch.float32) == 4 * (0.5 + 2 * EPS)
