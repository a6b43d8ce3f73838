"""A tail as one autograd node, in Triton's interpreter: every gate that a kernel computes, and every kind of norm."""

import copy
import math

import pytest
import torch
from torch import nn

import tail_norms
from ecanet import ECA, ECANS, SE, SEVar1, SEVar2, ops
from ecanet.testing import assert_within_budget
from tensors import surround_with_nan, to_layout

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

GATES = {
    "none": lambda c: None,
    "eca": lambda c: ECA(c, 5),
    "circular": lambda c: ECA(c, 3, padding_mode="circular", bias=True),
    "eca-ns": lambda c: ECANS(c, 5),
    "se-var1": SEVar1,
    "se-var2": SEVar2,
}
slow = pytest.mark.slow

NORMS = {
    **tail_norms.NORMS,
    "no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False).eval(),
    "average of batches": lambda c: nn.BatchNorm2d(c, momentum=None),
    "momentum and eps": lambda c: nn.BatchNorm2d(c, momentum=0.3, eps=0.1),
}


def make_case(shape, gate, norm="training", dtype=torch.float64, last=True):
    """Return z, shortcut and two dy; norm, gate, and a norm for the shortcut."""
    torch.manual_seed(0)
    tensors = [to_layout(torch.randn(shape), last).to(dtype) for _ in range(4)]
    tensors[0] = to_layout(2 * tensors[0] + 3 * torch.rand(shape[1], 1, 1).to(dtype), last)
    norm, gate, side = NORMS[norm](shape[1]), GATES[gate](shape[1]), nn.BatchNorm2d(shape[1])
    for module in (norm, side):
        if getattr(module, "affine", False):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    if gate is not None:
        gate.gain = 2.0
    return tensors, norm, gate, side


def run(impl, tensors, norm, gate, side, shortcut, activation, wide):
    """Return outputs, all gradients and the statistics by name."""
    norm, gate, side = (None if m is None else copy.deepcopy(m) for m in (norm, gate, side))
    if wide:
        norm, gate, side = (None if m is None else m.double() for m in (norm, gate, side))
    z, s, dy, second = (x.double() if wide else x if impl == "reference" else surround_with_nan(x) for x in tensors)
    z, s = z.detach().requires_grad_(), s.detach().requires_grad_()
    given = (None if gate is None else gate.weigh, None if shortcut is None else s, None)
    given = (*given[:2], side if shortcut == "normed" else None)
    outputs = ops.residual_tail_pair(z, norm, *given, activation, impl=impl)
    if impl == "fused":
        assert outputs[0].grad_fn._forward_cls.__module__ == "ecanet.ops.triton.node"
    leaves = {"dz": z} | ({} if shortcut is None else {"ds": s})
    modules = {"norm": norm, "gate": gate, "side": side if shortcut == "normed" else None}
    for name, module in modules.items():
        leaves |= {} if module is None else {f"{name}.{key}": p for key, p in module.named_parameters()}
    count = 1 if shortcut is None else 2
    found = torch.autograd.grad(outputs[:count], list(leaves.values()), (dy, second)[:count])
    found = {"y": outputs[0].detach()} | dict(zip(leaves, found, strict=True))
    return found | dict(norm.named_buffers())


def check_float64(shape, gate, norm, shortcut, last=True, activation="relu"):
    case = make_case(shape, gate, norm, last=last)
    case = (case[0], *(None if m is None else m.double() for m in case[1:]))
    actual = run("fused", *case, shortcut, activation, True)
    expected = run("reference", *case, shortcut, activation, True)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("gate", "norm", "shortcut"),
    [
        ("eca", "training", "normed"),
        ("circular", "evaluation", "plain"),
        pytest.param("none", "average of batches", "normed", marks=slow),
        *[pytest.param(g, n, s, marks=slow) for g in GATES for n, s in (("training", "plain"), ("frozen", None))],
        *[pytest.param("eca", n, "plain", marks=slow) for n in NORMS],
        *[pytest.param("none", n, None, marks=slow) for n in NORMS],
    ],
)
def test_float64_equals_the_reference(gate, norm, shortcut):
    """More channels than one program has, so that neighbours come from another one."""
    check_float64((3, 37, 3, 2), gate, norm, shortcut)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("shape", "last"), [((2, 3, 1, 1), False), ((1, 5, 40, 40), True), ((1, 5, 40, 40), False), ((70, 9, 2, 1), True)]
)
def test_shapes_in_float64(shape, last, gate):
    """Planes of one element, planes in several parts, and more samples than a block of rows has."""
    check_float64(shape, gate, "training", "plain", last)
    check_float64(shape, gate, "training", None, last, "relu6")


@pytest.mark.parametrize(
    ("dtype", "gate"),
    [
        (torch.bfloat16, "eca-ns"),
        *[pytest.param(d, g, marks=slow) for d in (torch.float32, torch.float16, torch.bfloat16) for g in GATES],
    ],
)
def test_results_are_within_the_error_budget(dtype, gate):
    case = make_case((3, 37, 5, 3), gate, dtype=dtype)
    for shortcut in ("plain", "normed"):
        actual = run("fused", *case, shortcut, None, False)
        low = run("reference", *case, shortcut, None, False)
        exact = run("reference", *case, shortcut, None, True)
        largest = float(case[0][2].abs().max())
        for name, value in exact.items():
            if name == "num_batches_tracked":
                continue
            roundings = 4 * math.isqrt(max(1, case[0][0].numel() // max(1, value.numel())))
            assert_within_budget(name, actual[name], low[name], value, roundings=roundings, magnitude=largest)


@pytest.mark.parametrize("shortcut", [pytest.param(None, marks=slow), pytest.param("plain", marks=slow), "normed"])
def test_gradients_may_be_differentiated_and_come_in_a_batch(shortcut):
    (z, s, dy, _), norm, gate, side = make_case((2, 5, 3, 2), "eca")
    norm, gate, side = norm.double(), gate.double(), side.double()

    def call(impl):
        x, t = z.clone().requires_grad_(), s.clone().requires_grad_()
        given = (copy.deepcopy(norm), gate.weigh, t if shortcut else None, side if shortcut == "normed" else None)
        return x, ops.residual_tail(x, *given, impl=impl)

    results = []
    for impl in ("fused", "reference"):
        x, y = call(impl)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        second = torch.autograd.grad((y * dy).sum() + dx.square().sum(), [x, gate.conv.weight])
        x, y = call(impl)
        many = torch.stack((dy, dy.flip(0)))
        results.append([*second, *torch.autograd.grad(y, [x, gate.conv.weight], many, is_grads_batched=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gates_of_another_form_stay_outside_of_the_kernel():
    """A subclass, a patched method, a hook that computes the weight: only `weigh` itself knows what they compute."""

    class Doubled(ECA):
        def gate(self, p):
            return 2 * super().gate(p)

    assert ECA(8).describe_gate() is not None
    assert Doubled(8).describe_gate() is None
    patched, hooked = ECANS(8), ECA(8)
    patched.gate = torch.sigmoid
    hooked.conv.register_forward_pre_hook(lambda *_: None)
    assert patched.describe_gate() is None
    assert hooked.describe_gate() is None
    z = torch.randn(2, 8, 3, 3)
    for gate in (SE(8).weigh, Doubled(8).weigh, Doubled(8).gate, torch.sigmoid):
        expected = ops.residual_tail(z, nn.BatchNorm2d(8), gate, impl="lean")
        torch.testing.assert_close(ops.residual_tail(z, nn.BatchNorm2d(8), gate, impl="fused"), expected)


def test_statistics_that_the_kernel_writes_are_known_to_autograd():
    """Whoever saved them for a backward gets PyTorch's error and no wrong gradient."""
    norm, z = nn.BatchNorm2d(5), torch.randn(2, 5, 3, 3)
    x = torch.ones(5, requires_grad=True)
    product = x * norm.running_mean
    ops.residual_tail(z, norm, impl="fused")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
