"""The lean and the fused passes against the float64 reference: value and every gradient, kernels interpreted."""

import copy
import math

import pytest
import torch
from torch import nn

from ecanet import ECA, ops
from ecanet.errors import ConfigError
from ecanet.studies.bench import traffic
from ecanet.testing import assert_within_budget
from tensors import draw, surround_with_nan, to_layout

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

SHAPES = [
    (2, 1, 1, 1),
    (1, 3, 7, 7),
    (5, 17, 7, 7),
    (2, 3, 17, 19),
    (1, 64, 7, 7),
    (1, 2048, 7, 7),
    (0, 3, 5, 5),
    (2, 70, 23, 29),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(
        shape,
        last,
        dtype,
        id=f"{shape}-{'channels_last' if last else 'contiguous'}-{dtype}",
        # Triton's interpreter takes seconds for the large ones. Of the others each shape has both layouts and
        # two dtypes by default, and each dtype both layouts.
        marks=[pytest.mark.slow] if max(shape) > 64 or (last + at + DTYPES.index(dtype)) % 3 else [],
    )
    for at, shape in enumerate(SHAPES)
    for last in (False, True)
    for dtype in DTYPES
]


def case(shape, last, dtype, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    torch.manual_seed(seed)  # the gate draws its weights from the global generator
    tensors = [to_layout(draw(shape, generator), last).to(dtype) for _ in range(3)]
    tensors[0] = tensors[0] * 2 + 3
    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.copy_(draw((shape[1],), generator))
    return [to_layout(x, last) for x in tensors], norm, ECA(shape[1])


def results(impl, tensors, norm, gate, shortcut, activation, wide, pair=False):
    """Return y, all gradients and the running statistics; with ``pair`` each of two outputs has a gradient."""
    norm, gate = (copy.deepcopy(m).double() if wide else copy.deepcopy(m) for m in (norm, gate))
    side = copy.deepcopy(norm).train(norm.training) if shortcut == "normed" else None
    z, s, dy = (x.double() if wide else x if impl == "reference" else surround_with_nan(x) for x in tensors)
    z, s = z.detach().requires_grad_(), s.detach().requires_grad_()
    addend = None if shortcut is None else s
    function = ops.residual_tail_pair if pair else ops.residual_tail
    y = function(z, norm, gate.weigh, addend, side, activation, impl=impl)
    leaves = [z, *norm.parameters(), *gate.parameters()]
    leaves += [] if shortcut is None else [s]
    leaves += [] if side is None else list(side.parameters())
    gradients = torch.autograd.grad(y, leaves, (dy, dy.flip(1)) if pair else dy)
    y = y[1] if pair else y
    return [y.detach(), *gradients, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("impl", ["lean", "fused"])
@pytest.mark.parametrize(("shape", "last", "dtype"), CASES)
def test_tail_is_within_the_error_budget(shape, last, dtype, impl):
    tensors, norm, gate = case(shape, last, dtype)
    dy = tensors[2]
    for index, (shortcut, activation) in enumerate(
        [("plain", "relu"), (None, "relu6"), ("normed", "relu"), ("plain", None)]
    ):
        if shape[1] > 100 and index > 1:
            continue  # the wide one once with and once without a shortcut
        norm.train(index != 3)
        # some outputs must exceed 6; in 16 bits rounding alone would decide which are clipped
        large = 16 if activation == "relu6" and dtype == torch.float32 else 1
        with torch.no_grad():
            norm.weight.mul_(large)
        actual = results(impl, tensors, norm, gate, shortcut, activation, False)
        low = results("reference", tensors, norm, gate, shortcut, activation, False)
        oracle = results("reference", tensors, norm, gate, shortcut, activation, True)
        for number, (a, b, c) in enumerate(zip(actual, low, oracle, strict=True)):
            # a sum of n terms in another order differs by about sqrt(n) roundings (parameters': float32)
            roundings = 4 * math.isqrt(max(1, dy.numel() // max(1, a.numel())))
            # gradients are differences of terms as large as dy, which may leave nothing: their rounding is that of dy
            name, largest = f"{shortcut} {activation} result {number}", float(dy.abs().max()) if dy.numel() else 0
            assert_within_budget(name, a, b, c, roundings=roundings, magnitude=largest)


@pytest.mark.parametrize(
    ("impl", "last", "pair"),
    [
        pytest.param(
            impl,
            last,
            pair,
            id=f"{impl}-{'channels_last' if last else 'contiguous'}-{'two outputs' if pair else 'one output'}",
            marks=[pytest.mark.slow] * (impl == "fused" and last == pair),
        )
        for impl in ("lean", "fused")
        for last in (False, True)
        for pair in (False, True)
    ],
)
def test_float64_equals_the_reference(impl, last, pair):
    """In float64 only the order of sums differs."""
    tensors, norm, gate = case((3, 17, 9, 11), last, torch.float64)
    norm, gate = norm.double(), gate.double()
    for shortcut, activation in [("plain", "relu"), (None, "relu"), ("normed", "relu6"), ("plain", None)]:
        actual = results(impl, tensors, norm, gate, shortcut, activation, True, pair)
        expected = results("reference", tensors, norm, gate, shortcut, activation, True, pair)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("group", "large"), [(1, 1), (2 * 17 * 99, 1), (2 * 17 * 99, 2**18)])
def test_lean_passes_in_groups_of_samples(group, large, last, monkeypatch):
    """Groups of one and of two samples, reduced by a native operation for each sample or by several for the group."""
    monkeypatch.setattr(ops.lean, "GROUP_ELEMENTS", group)
    monkeypatch.setattr(ops.lean, "LARGE_SAMPLE_ELEMENTS", large)
    monkeypatch.setattr(ops.lean, "LARGE_SAMPLE_MOMENTS", large)
    tensors, norm, gate = case((5, 17, 9, 11), last, torch.float64)
    tensors[0] += torch.arange(5)[:, None, None, None]  # samples with means of their own
    norm, gate = norm.double(), gate.double()
    for shortcut in ("plain", "normed"):
        actual = results("lean", tensors, norm, gate, shortcut, "relu", True)
        expected = results("reference", tensors, norm, gate, shortcut, "relu", True)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["lean", "fused"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_large_means_do_not_cancel(last, impl):
    """A mean of a thousand standard deviations costs no more digits than in the reference."""
    tensors, norm, gate = case((3, 17, 9, 11), last, torch.float32)
    tensors[0] = (tensors[0] - 3) / 2 + 1000
    three = [
        results(kind, tensors, norm, gate, "plain", None, wide)
        for kind, wide in ((impl, False), ("reference", False), ("reference", True))
    ]
    for number, (a, b, c) in enumerate(zip(*three, strict=True)):
        assert_within_budget(
            f"result {number}", a, b, c, roundings=1000
        )  # one rounding of the mean is 1000 of a deviation


@pytest.mark.parametrize(
    ("impl", "shortcut", "training"),
    [
        # The statistics of evaluation are constants, which the case with two norms shows.
        pytest.param(
            impl,
            shortcut,
            training,
            id=f"{impl}-{shortcut}-{'training' if training else 'evaluation'}",
            marks=[pytest.mark.slow] * (impl == "fused" and not training and shortcut != "normed"),
        )
        for impl in ("lean", "fused")
        for shortcut in ("plain", "normed", None, "no norm")
        for training in (True, False)
    ],
)
def test_gradients_by_gradcheck(impl, shortcut, training):
    """Finite differences do not depend on the formulas."""
    (z, s, _), norm, gate = case((2, 3, 3, 2), True, torch.float64)
    norm, gate = norm.double().train(training), gate.double()
    side = copy.deepcopy(norm) if shortcut == "normed" else None

    def function(z, s, weight, bias, taps):
        def weigh(p):
            return torch.sigmoid(nn.functional.conv1d(p[:, None], taps, padding="same")).flatten(1)

        if shortcut == "no norm":
            return ops.squeeze_scale(z, weigh, impl=impl)
        y = copy.deepcopy(norm)
        del y.weight, y.bias
        y.weight, y.bias = weight, bias
        return ops.residual_tail(z, y, weigh, s if shortcut else None, side, impl=impl)

    given = [z, s, norm.weight, norm.bias, gate.conv.weight]
    given = [x.detach().clone().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(function, given, fast_mode=impl == "fused")


@pytest.mark.parametrize("impl", ["lean", "fused"])
def test_second_backward_equals_the_first(impl):
    tensors, norm, gate = case((2, 17, 7, 7), True, torch.float32)
    z, s, dy = tensors
    z.requires_grad_()
    s.requires_grad_()
    y = ops.residual_tail(z, norm, gate.weigh, s, impl=impl)
    first = torch.autograd.grad(y, [z, s, *norm.parameters()], dy, retain_graph=True)
    second = torch.autograd.grad(y, [z, s, *norm.parameters()], dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["lean", "fused"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_second_derivatives_equal_the_reference(impl, activation):
    """A penalty on the gradient, in the same backward as the loss itself."""
    tensors, norm, gate = case((2, 5, 4, 3), True, torch.float64)
    norm, gate = norm.double(), gate.double()

    def total(impl, shortcut):
        z, s, dy = (x.clone().requires_grad_() for x in tensors)
        y = ops.residual_tail(z, copy.deepcopy(norm), gate.weigh, s if shortcut else None, None, activation, impl=impl)
        (dz,) = torch.autograd.grad(y, z, dy, create_graph=True)
        return torch.autograd.grad((y * dy).sum() + dz.square().sum(), [z, gate.conv.weight])

    for shortcut in (True, False):
        for a, b in zip(total(impl, shortcut), total("reference", shortcut), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["lean", "fused"])
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)], ids=str)
def test_gradients_of_two_outputs_are_within_the_error_budget(dtype, impl):
    """The two gradients are added before they are rounded, so the sum is never worse than autograd's."""
    tensors, norm, gate = case((2, 17, 17, 19), True, dtype)
    for shortcut in ("plain", "normed"):
        three = [
            results(kind, tensors, norm, gate, shortcut, "relu", wide, True)
            for kind, wide in ((impl, False), ("reference", False), ("reference", True))
        ]
        for number, (a, b, c) in enumerate(zip(*three, strict=True)):
            summed = max(1, tensors[2].numel() // max(1, a.numel()))
            assert_within_budget(f"{shortcut} result {number}", a, b, c, roundings=4 * math.isqrt(summed))


@pytest.mark.parametrize("impl", ["lean", "fused"])
def test_each_output_alone_carries_its_gradient(impl):
    tensors, norm, gate = case((2, 17, 7, 7), True, torch.float32)
    z, s, dy = tensors
    z.requires_grad_()
    s.requires_grad_()
    outputs = ops.residual_tail_pair(z, norm, gate.weigh, s, impl=impl)
    assert torch.equal(*outputs)
    expected = torch.autograd.grad(ops.residual_tail(z, norm, gate.weigh, s, impl=impl), [z, s], dy)
    for output in outputs:
        found = torch.autograd.grad(output, [z, s], dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one, both = ops.residual_tail_pair(
        z, norm, gate.weigh, None, impl=impl
    )  # without a shortcut there is one gradient path
    assert one is both


def test_bytes_moved_by_the_backward_of_two_outputs():
    """The reduction adds the two gradients: it reads one tensor more, and autograd's three passes are saved."""
    tensors, norm, gate = case((2, 64, 16, 16), True, torch.bfloat16)
    z, s, dy = tensors
    z.requires_grad_()
    s.requires_grad_()
    one = z.numel() * z.element_size()
    outputs = ops.residual_tail_pair(z, norm, gate.weigh, s, impl="fused")
    with traffic.count_interpreted_accesses() as backward:
        torch.autograd.grad(outputs, [z, s], (dy, dy))
    assert backward.moved / one == 4 + 1 / 16 + 3  # two gradients, bits, z, t; t, z, dz


def test_bytes_moved_by_forward_and_backward():
    """The documented numbers: 4.1 tensors forward; 9.2 backward, with autograd's 3 for the residual sum."""
    tensors, norm, gate = case((2, 64, 16, 16), True, torch.bfloat16)
    z, s, dy = tensors
    z.requires_grad_()
    s.requires_grad_()
    one = z.numel() * z.element_size()
    with traffic.count_interpreted_accesses() as forward:
        y = ops.residual_tail(z, norm, gate.weigh, s, impl="fused")
    with traffic.count_interpreted_accesses() as backward:
        torch.autograd.grad(y, [z, s], dy)
    assert forward.moved / one == 1 + 3 + 1 / 16  # z; z, shortcut, y, and one bit for each of 16
    assert backward.moved / one == 3 + 1 / 16 + 3  # dy, bits, z, t; t, z, dz; and autograd's 3


def test_bytes_moved_by_eager_pytorch():
    """The documented numbers: 11 and 21 tensors. Batch norm is one operation there, but it reads z twice."""
    tensors, norm, gate = case((2, 128, 24, 24), True, torch.float32)
    x = tensors[0].requires_grad_()
    convolution = nn.Conv2d(128, 128, 1)  # so that the block's input has two gradients
    with traffic.count_operations(smallest=x.numel()) as forward:
        b = norm(convolution(x))
        g = torch.sigmoid(gate.conv(b.mean((2, 3))[:, None])).flatten(1)[..., None, None]
        y = (b * g + x).relu()
    with traffic.count_operations(smallest=x.numel()) as backward:
        torch.autograd.grad(y, x, tensors[2])
    one = x.numel() * x.element_size()
    assert (forward.moved / one + 1, backward.moved / one + 2) == (11, 21)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neutral_gate_is_bit_equal_to_the_identity(dtype, last):
    (x, _, dy), _, gate = case((2, 17, 9, 11), last, dtype)
    gate.neutralize()
    for impl in ("lean", "fused"):
        z = x.detach().requires_grad_()
        y = ops.squeeze_scale(z, gate.weigh, impl=impl)
        (dz,) = torch.autograd.grad(y, z, dy)
        assert torch.equal(y, x)
        assert torch.equal(dz, dy)
        assert y.stride() == dz.stride() == x.stride()


def test_operators_pass_opcheck():
    from ecanet.ops.triton import launch as fused

    (z, s, dy), _, _ = case((2, 17, 7, 5), True, torch.float32)
    a, mu = torch.rand(2, 17), torch.rand(17)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ecanet.moments, (z, 2), test_utils=checks)
    torch.library.opcheck(torch.ops.ecanet.apply_packed, (z, s, a, a, mu, None, None, "relu"), test_utils=checks)
    _, bits = fused._apply_packed(z, s, a, a, mu, None, None, "relu")
    for second_dy in (None, s):
        arguments = (dy, second_dy, bits, z, None, a, a, mu, None, "relu")
        torch.library.opcheck(torch.ops.ecanet.reduce_packed, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.ecanet.grads, (dy, z, a, a, mu, a, a, a, None), test_utils=checks)


def test_explicit_choice_that_does_not_apply_raises():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="unknown impl 'fast'"):
        ops.squeeze_scale(x, torch.sigmoid, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use impl='reference'"):
        ops.residual_tail(x, nn.GroupNorm(1, 3), impl="lean")
    with pytest.raises(ConfigError, match="more than one value per channel"):
        ops.residual_tail(x[:1, :, :1, :1], nn.BatchNorm2d(3), torch.sigmoid, impl="lean")
