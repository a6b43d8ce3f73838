"""The implementations under hooks on saved tensors, batched gradients, tracing, checkpoints and unusual gates."""

import copy
import io

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ecanet
from ecanet import ECA, ops
from ecanet.ops import lean
from tensors import draw, to_layout

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

IMPLS = pytest.mark.parametrize("impl", ["lean", "fused"])


def tensors(shape=(3, 8, 5, 7), last=True, count=3):
    generator = torch.Generator("cpu").manual_seed(0)
    return [to_layout(draw(shape, generator), last) for _ in range(count)]


def gradients(impl, activation, shortcut, side=None):
    """Return the gradients of a residual tail with respect to its inputs and parameters."""
    torch.manual_seed(0)
    z, s, dy = tensors()
    norm, gate = nn.BatchNorm2d(8), ECA(8)
    side = nn.BatchNorm2d(8) if side else None
    z.requires_grad_(), s.requires_grad_()
    y = ops.residual_tail(z, norm, gate.weigh, s if shortcut else None, side, activation, impl=impl)
    leaves = [
        z,
        *norm.parameters(),
        *gate.parameters(),
        *([s] if shortcut else []),
        *(side.parameters() if side else []),
    ]
    return torch.autograd.grad(y, leaves, dy)


@IMPLS
@pytest.mark.parametrize(("shortcut", "side"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("activation", ["relu", None])
def test_saved_tensors_may_return_in_another_layout(impl, activation, shortcut, side):
    expected = gradients(impl, activation, shortcut, side)
    # as save_on_cpu(pin_memory=True) packs: into a new tensor of the size, which is contiguous
    with saved_tensors_hooks(
        lambda x: torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x), lambda x: x
    ):
        actual = gradients(impl, activation, shortcut, side)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


GATES = {
    "one weight a sample": lambda p: p.mean(1, keepdim=True).sigmoid(),
    "one weight a channel": lambda p: p.mean(0, keepdim=True).sigmoid(),
    "without samples": lambda p: p.mean(0).sigmoid(),
}


@pytest.mark.parametrize("impl", ["auto", "lean", "fused"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gate_may_return_a_shape_that_broadcasts(gate, impl):
    z, s, dy = tensors()
    norm = nn.BatchNorm2d(8)

    def of(function, *args, impl):
        x = z.clone().requires_grad_()
        y = function(x, *args, impl=impl)
        return y.detach(), *torch.autograd.grad(y, x, dy)

    for training in (True, False):
        norm.train(training)
        for call in ((ops.squeeze_scale, gate), (ops.residual_tail, norm, gate, s)):
            for a, b in zip(of(*call, impl=impl), of(*call, impl="reference"), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@IMPLS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_not_updated_when_tracking_is_off(impl, momentum):
    z, s, _ = tensors()
    norm = nn.BatchNorm2d(8, momentum=momentum)
    norm.track_running_stats = False
    before = copy.deepcopy(norm.state_dict())
    y = ops.residual_tail(z, norm, ECA(8).weigh, s, impl=impl)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert y.isfinite().all()


def test_batched_gradients_equal_single_ones():
    model = ecanet.create_model("resnet8", num_classes=5).double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    y, many = model(x), torch.randn(3, 2, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_traced_model_can_be_saved():
    import torchvision

    small = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    for model in (ecanet.attach(small), ecanet.create_model("resnet8", in_channels=3)):
        x = torch.randn(2, 3, 40, 40)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model.eval(), x), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-4)


@IMPLS
def test_checkpoint_recomputes_by_the_same_implementation(impl):
    z, s, dy = tensors()
    norm, gate = nn.BatchNorm2d(8), ECA(8)
    z.requires_grad_()
    expected = torch.autograd.grad(ops.residual_tail(z, norm, gate.weigh, s, impl=impl), z, dy)
    with ops.prefer_impl(impl):
        y = checkpoint(lambda z: ops.residual_tail(z, norm, gate.weigh, s), z, use_reentrant=False)
        found = torch.autograd.grad(y, z, dy)
    assert torch.equal(*found, *expected)
    assert ops.get_requested_impl() is None


def test_preferred_implementation_holds_in_other_threads():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, ops.prefer_impl("fused"):
        assert pool.submit(ops.uses_kernels, torch.ones(1)).result()


def test_preferences_may_end_in_any_order():
    first, second = ops.prefer_impl("lean"), ops.prefer_impl("fused")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.get_requested_impl() == "fused"
    second.__exit__(None, None, None)
    assert ops.get_requested_impl() is None


def test_evaluation_output_has_the_layout_of_the_branch():
    z, s, _ = tensors()
    norm = nn.BatchNorm2d(8).eval()
    for impl in ("auto", "reference", "lean"):
        y = ops.residual_tail(z, norm, ECA(8).weigh, s.contiguous(), impl=impl)
        assert y.stride() == z.stride(), impl


@pytest.mark.parametrize("activation", ["relu", "relu6", None])
def test_input_is_not_modified(activation):
    z, _, _ = tensors()
    before = z.clone()
    ops.residual_tail(z, nn.Identity(), activation=activation)
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("short", "attention", "dtype"),
    [
        # by default, each two of the three in every combination
        pytest.param(short, attention, dtype, marks=[pytest.mark.slow] * ((a + b + c) % 2))
        for a, short in enumerate([ecanet.fuse, ecanet.optimize])
        for b, attention in enumerate(["eca", "se"])
        for c, dtype in enumerate([torch.bfloat16, torch.float16])
    ],
)
def test_timm_gates_in_half_precision(short, attention, dtype):
    torch.manual_seed(0)
    options = {"attn_layer": attention}
    # with last norms that are not zero, or no gate would matter
    model = timm.create_model("resnet18", block_args=options, num_classes=5, zero_init_last=False).eval().to(dtype)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    expected = copy.deepcopy(model).float()(x.float())
    with torch.no_grad():
        y = short(model)(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_benchmark_refuses_nan_gradients(monkeypatch):
    from ecanet.errors import ConfigError
    from ecanet.studies.bench import check as bench_check

    right = lean.grads
    monkeypatch.setattr(lean, "grads", lambda *a: torch.full_like(right(*a), float("nan")))
    with pytest.raises(ConfigError, match="nothing was timed"):
        bench_check.check_layers([(32, 8, 8)], "cpu", fused=False)
