"""GCT and SRM in a tail: their statistics follow from the moments of the convolution's output, with no further pass."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

import ecanet
from ecanet import ops
from ecanet.attention import GCT, SRM
from ecanet.ops import lean
from ecanet.testing import assert_within_budget, find_elementwise_excess
from tail_norms import NORMS
from tensors import draw, surround_with_nan, to_layout

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

GATES = pytest.mark.parametrize("kind", [GCT, SRM])
IMPLS = pytest.mark.parametrize("impl", ["lean", "fused"])
slow = pytest.mark.slow


def make_case(kind, shape, last, dtype=torch.float64, norm="training"):
    """Return z, shortcut and dy, and the norm, gate and shortcut's norm, each with parameters of its own."""
    torch.manual_seed(0)
    generator = torch.Generator("cpu").manual_seed(0)
    z, *others = (draw(shape, generator) for _ in range(3))
    # each plane has a mean and a deviation of its own
    z = z * (0.5 + draw((*shape[:2], 1, 1), generator).abs()) + 3 * draw((*shape[:2], 1, 1), generator)
    norms = NORMS[norm](shape[1]), nn.BatchNorm2d(shape[1])
    for one in norms:
        if isinstance(one, nn.BatchNorm2d) and one.affine:
            nn.init.uniform_(one.weight, 0.5, 1.5), nn.init.normal_(one.bias)
    gate = kind(shape[1])
    gate.gain = 2.0
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return [to_layout(x, last).to(dtype) for x in (z, *others)], [norms[0], gate, norms[1]]


def run(impl, tensors, modules, shortcut, wide):
    """Return output, all gradients and the running statistics by name."""
    modules = [copy.deepcopy(m).double() if wide else copy.deepcopy(m) for m in modules]
    norm, gate, side = modules
    given = [x.double() if wide else x if impl == "reference" else surround_with_nan(x) for x in tensors]
    z, s, dy = (x.detach().requires_grad_() for x in given)
    normed = side if shortcut == "normed" else None
    if shortcut == "no norm":
        y = ops.squeeze_scale(z, gate.describe_gate(), impl=impl)
    else:
        y = ops.residual_tail(z, norm, gate.describe_gate(), s if shortcut else None, normed, impl=impl)
    leaves = {"dz": z} | ({"ds": s} if shortcut in ("plain", "normed") else {})
    used = {"gate": gate} | ({} if shortcut == "no norm" else {"norm": norm}) | ({"side": side} if normed else {})
    leaves |= {f"{name}.{key}": p for name, module in used.items() for key, p in module.named_parameters()}
    found = {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    found |= {f"{name}.{key}": b for name, module in used.items() for key, b in module.named_buffers()}
    return {key: x for key, x in found.items() if x.is_floating_point()}


def check_budget(impl, tensors, modules, shortcut, roundings=1.0):
    actual, low = (run(kind, tensors, modules, shortcut, False) for kind in (impl, "reference"))
    exact = run("reference", tensors, modules, shortcut, True)
    largest = float(tensors[2].abs().max())
    for name, value in exact.items():
        # a sum of n terms in another order differs by about sqrt(n) roundings
        summed = max(1, tensors[0].numel() // max(1, value.numel()))
        allowed = max(roundings, 4 * math.sqrt(summed))
        assert_within_budget(name, actual[name], low[name], value, roundings=allowed, magnitude=largest)


@pytest.mark.parametrize(
    ("norm", "shortcut", "last"),
    [
        ("training", "normed", True),
        ("frozen", "plain", False),
        ("training", "no norm", True),
        *[pytest.param(n, s, last, marks=slow) for n in NORMS for s in (None, "plain") for last in (True, False)],
    ],
)
@IMPLS
@GATES
def test_float64_equals_the_reference(kind, impl, norm, shortcut, last):
    """The reference computes norm(z), and the gate's statistics from that; only the order of sums may differ."""
    tensors, modules = make_case(kind, (3, 9, 5, 7), last, norm=norm)
    actual, expected = (run(one, tensors, modules, shortcut, True) for one in (impl, "reference"))
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("shape", "dtype", "last"),
    [
        ((2, 9, 7, 5), torch.bfloat16, True),
        *[
            pytest.param(shape, dtype, last, marks=slow)
            for shape in ((2, 1, 1, 1), (2, 9, 7, 5), (2, 70, 23, 29), (5, 17, 40, 40))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for last in (False, True)
        ],
    ],
)
@IMPLS
@GATES
def test_results_are_within_the_error_budget(kind, impl, shape, dtype, last):
    tensors, modules = make_case(kind, shape, last, dtype)
    for shortcut in ("plain", "normed", None) if dtype == torch.float32 else ("normed",):
        check_budget(impl, tensors, modules, shortcut)


@pytest.mark.parametrize("last", [True, pytest.param(False, marks=slow)], ids=["channels_last", "contiguous"])
@IMPLS
@GATES
def test_large_means_cost_no_more_digits_than_in_the_reference(kind, impl, last):
    """One rounding of a mean of a thousand deviations is a thousand roundings of a deviation."""
    tensors, modules = make_case(kind, (3, 9, 5, 7), last, torch.float32)
    tensors[0] = tensors[0] + 1000
    check_budget(impl, tensors, modules, "plain", roundings=1000)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize(
    ("shape", "last"), [((1, 8, 256, 256), True), ((3, 8, 96, 96), False), ((3, 8, 5, 7), True), ((1, 3, 1, 1), True)]
)
def test_the_variance_of_each_plane_is_right(shape, last, offset):
    """A sum of n positive numbers, added one by one, is off by about sqrt(n) roundings of itself, never by n / 2.

    The mean m may be off by 8 eps. Natively its sum K may be off by hundreds. In ``v - (K - m)^2`` the error of m meets
    that of K, which leaves ``2 (K - m) (8 eps m)``, less than ``(64 eps m)^2``.
    """
    (z, *_), _ = make_case(GCT, shape, last, torch.float32)
    z = z + offset
    wide = z.double().flatten(2)
    exact = wide.var(2, correction=0)
    eps = torch.finfo(torch.float32).eps
    for kind in [*ops.list_implementations()] if shape[2] < 9 else [lean]:
        m, v = kind.moments(z, 2)
        assert find_elementwise_excess("mean", m, wide.mean(2), 8 * eps * wide.abs().mean(2)) is None
        allowed = 4 * math.sqrt(wide.shape[2]) * eps * exact + (64 * eps * wide.mean(2)).square()
        assert find_elementwise_excess("variance", v, exact, allowed + 1e-30) is None


@IMPLS
def test_a_constant_plane_has_no_deviation_and_no_gradient_of_it(impl):
    """The mean of many 0.1 is not 0.1 in float32. The distance from it would give a gradient in a random direction."""
    tensors, modules = make_case(SRM, (3, 9, 5, 7), True, torch.float32)
    for value, channel in ((0.1, 0), (1e3 + 0.1, 3), (0.0, 4)):
        tensors[0][1, channel] = value
    check_budget(impl, tensors, modules, "plain", roundings=1000)
    actual, exact = (run(one, tensors, modules, "no norm", one == "reference") for one in (impl, "reference"))
    for channel in (0, 3, 4):
        torch.testing.assert_close(actual["dz"][1, channel].double(), exact["dz"][1, channel], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["lean", pytest.param("fused", marks=slow)])
@GATES
def test_gradients_by_gradcheck(kind, impl):
    (z, s, _), (norm, gate, _) = make_case(kind, (2, 3, 3, 2), True)
    norm, gate = norm.double(), gate.double()

    def function(z, s):
        return ops.residual_tail(z, copy.deepcopy(norm), gate.describe_gate(), s, activation=None, impl=impl)

    assert torch.autograd.gradcheck(function, [z.requires_grad_(), s.requires_grad_()], fast_mode=True)


@GATES
def test_second_derivatives_equal_the_reference(kind):
    tensors, (norm, gate, _) = make_case(kind, (2, 3, 3, 2), True)
    norm, gate = norm.double(), gate.double()

    def total(impl):
        z, s, dy = (x.clone().requires_grad_() for x in tensors)
        y = ops.residual_tail(z, copy.deepcopy(norm), gate.describe_gate(), s, impl=impl)
        (dz,) = torch.autograd.grad(y, z, dy, create_graph=True)
        return torch.autograd.grad((y * dy).sum() + dz.square().sum(), [z, *gate.parameters()])

    for a, b in zip(total("lean"), total("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gct", "srm"])
def test_networks_train_by_the_moments(name, monkeypatch):
    """In a block that is run by its parts nothing measures the norm's output."""
    model = ecanet.create_model("resnet8", attention=name, num_classes=3).train()
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 16, 16)
    for module in plain.modules():
        module.register_forward_hook(lambda *_: None)  # so every module is called
    expected = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    monkeypatch.setattr("ecanet.attention.moments.compute_norms", None)
    monkeypatch.setattr("ecanet.attention.moments.compute_styles", None)
    with ops.prefer_impl("lean"):
        found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-4)


@GATES
def test_kernels_serve_the_module_alone(kind):
    (x, _, dy), (_, gate, _) = make_case(kind, (2, 5, 3, 4), True, torch.float32)
    results = []
    for impl in ("lean", "fused"):
        module, leaf = copy.deepcopy(gate), x.clone().requires_grad_()
        with ops.prefer_impl(impl):
            y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gates_that_measure_something_else_are_called():
    """A subclass or a patch that changes what is measured: only the module itself knows what it computes."""

    class Halved(SRM):
        def measure(self, x, mask=None):
            return super().measure(x, mask) / 2

    class Doubled(GCT):
        def weigh(self, x, mask=None):
            return 2 * super().weigh(x, mask)

    patched = GCT(4)
    patched.measure = lambda x, mask=None: x.flatten(2).amax(2)
    assert GCT(4).describe_gate() is not None
    assert all(gate.describe_gate() is None for gate in (Halved(4), Doubled(4), patched))
    model = ecanet.create_model("resnet8", attention=Halved, num_classes=3).train()
    x = torch.randn(4, 3, 16, 16)
    expected = copy.deepcopy(model)
    expected.layer1[0].register_forward_hook(lambda *_: None)
    with ops.prefer_impl("lean"):
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)


@slow
@pytest.mark.parametrize("name", ["gct", "srm"])
def test_compiled_networks_keep_the_tails_of_these_gates(name):
    """One graph with the kernels' operators, and the values and gradients of the eager network."""
    graphs = AotEagerAndRecordGraphs()
    eager = ecanet.create_model("resnet8", attention=name, num_classes=3).train()
    compiled, x = copy.deepcopy(eager), torch.randn(2, 3, 8, 8)
    results = []
    with ops.prefer_impl("fused"):
        for model, call in ((eager, eager), (compiled, torch.compile(compiled, backend=graphs, fullgraph=True))):
            y = call(x)
            results.append([y, *torch.autograd.grad(y.sum(), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    names = [str(node.target) for node in graphs.fw_graphs[0].graph.nodes]
    assert sum("ecanet.apply_packed" in one for one in names) == 3
