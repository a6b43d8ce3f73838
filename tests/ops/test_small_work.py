"""Where kernels cost more Python than they save bytes, "auto" takes PyTorch's operations: small norms in evaluation."""

import pytest
import torch
from torch import nn

import ecanet
from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.ops import dispatch, proof
from ecanet.ops.dispatch import SMALL
from ecanet.ops.tail import uses_batch_statistics

pytest.importorskip("triton")

ECA = ecanet.ECA


@pytest.fixture
def ran(monkeypatch):
    """Treat the CPU as a GPU with right kernels and a limit of 100 elements; return a list of the passes that run."""
    names = []
    for passes in dispatch.list_implementations():
        name = passes.__name__.rpartition(".")[2]

        def run(*args, _run=passes.apply, _name=name):
            names.append(_name)
            return _run(*args)

        monkeypatch.setattr(passes, "apply", run)
        monkeypatch.setattr(passes, "run_tail", lambda *args: None)
    plain = ops.lean.compute_plain_tail
    monkeypatch.setattr(ops.lean, "compute_plain_tail", lambda *args: names.append("plain") or plain(*args))
    monkeypatch.setattr(dispatch, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(proof, "is_proven", lambda *key: True)
    monkeypatch.setattr(dispatch, "SMALL", 100)
    return names


def run(elements, gated=False, training=False, grad=False, shortcut=True):
    torch.manual_seed(0)
    z = torch.randn(1, elements // 4, 2, 2)
    norm = nn.BatchNorm2d(z.shape[1]).train(training)
    with torch.set_grad_enabled(grad):
        gate = ECA(z.shape[1], 3).weigh if gated else None
        y = ops.residual_tail(z, norm, gate, torch.ones_like(z) if shortcut else None)
    expected = ops.residual_tail(z, norm, gate, torch.ones_like(z) if shortcut else None, impl="reference")
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(("elements", "expected"), [(4, "plain"), (96, "plain"), (100, "launch"), (104, "launch")])
def test_the_limit_decides_in_evaluation(ran, elements, expected, shortcut):
    run(elements, shortcut=shortcut)
    assert ran == [expected]


@pytest.mark.parametrize("case", [{"gated": True}, {"training": True, "grad": True}, {"grad": True}])
def test_with_a_gate_or_with_gradients_the_kernels_always_run(ran, case):
    run(8, **case)
    assert ran == ["launch"]


def test_a_choice_of_the_kernels_is_kept(ran):
    with ops.prefer_impl("fused"):
        run(8)
    assert ran == ["launch"]


def test_activations_inside_a_block_follow_the_same_limit(ran):
    """They are a call of their own: without kernels PyTorch's modules are called."""
    network = ecanet.create_model("resnet8").eval()
    with torch.no_grad():
        network(torch.randn(1, 3, 2, 2))
        small, large = list(ran), ran.clear()
        network(torch.randn(64, 3, 4, 4))
    assert set(small) == {"launch"}  # the three gates
    assert len(small) == 3
    assert large is None
    assert len(ran) > 3


@pytest.mark.parametrize(("batch", "small"), [(1, True), (5, True), (256, False), (1024, False)])
def test_the_limit_is_on_the_right_side_of_common_batches(batch, small):
    """All norms of ResNet-50 at 224 pixels are small in a batch of 5, and none is in one of 256."""
    with torch.device("meta"):
        network = ecanet.create_model("resnet50").eval()
    sizes = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not uses_batch_statistics(module)
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    with torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(sizes) == 53
    limits = min(sizes) * batch, max(sizes) * batch
    assert limits[1] < SMALL if small else limits[0] >= SMALL


@pytest.mark.parametrize(("batch", "passes"), [(255, 0), (256, 1)])
def test_small_tails_with_gates_on_moments_are_pytorchs_operations_on_a_cpu(monkeypatch, batch, passes):
    """The four passes would take up to twice as long; a request for them is kept."""
    ran, right = [], ops.lean.moments
    monkeypatch.setattr(ops.lean, "moments", lambda *args: ran.append(1) or right(*args))
    z, gate = torch.randn(batch, 4, 16, 16, requires_grad=True), ecanet.attention.SRM(4).describe_gate()
    results = [ops.residual_tail(z, nn.BatchNorm2d(4), gate, torch.ones_like(z))]
    assert len(ran) == passes
    with ops.prefer_impl("lean"):
        results.append(ops.residual_tail(z, nn.BatchNorm2d(4), gate, torch.ones_like(z)))
    assert len(ran) == passes + 1
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), z)[0] for y in results), rtol=1e-3, atol=1e-4)


def test_small_tails_with_gates_on_moments_keep_the_errors_and_the_empty_batch():
    norm, gate = nn.BatchNorm2d(4), ecanet.attention.GCT(4).describe_gate()
    with pytest.raises(ConfigError, match="more than one value per channel, got 1"):
        ops.residual_tail(torch.randn(1, 4, 1, 1), norm, gate)
    before = {key: value.clone() for key, value in norm.state_dict().items() if "running" in key}
    assert ops.residual_tail(torch.randn(0, 4, 3, 3), norm, gate).shape == (0, 4, 3, 3)
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())


@pytest.fixture
def lean_passes(monkeypatch):
    """Return a list of the elements of each tensor that the lean passes multiply; the limit is 100 elements."""
    elements = []
    apply = ops.lean.apply
    monkeypatch.setattr(ops.lean, "apply", lambda z, *args: elements.append(z.numel()) or apply(z, *args))
    monkeypatch.setattr(ops.lean, "SMALL_SCALE", 100)
    return elements


@pytest.mark.parametrize(
    ("elements", "grad", "dtype", "expected"),
    [
        (96, True, torch.float32, []),
        (100, True, torch.float32, [100]),
        (400, False, torch.float32, []),
        (96, True, torch.bfloat16, [96]),  # PyTorch's operations round once more
        (96, False, torch.bfloat16, [96]),
    ],
)
def test_a_gate_alone_takes_pytorchs_operations_where_they_are_faster(lean_passes, elements, grad, dtype, expected):
    x = torch.randn(1, elements // 4, 2, 2, dtype=dtype)
    attention = ECA(x.shape[1], 3)
    with torch.set_grad_enabled(grad):
        y = attention(x)
        assert lean_passes == expected
        torch.testing.assert_close(y, ops.squeeze_scale(x, attention.weigh, impl="lean"))


def test_a_gate_alone_runs_the_passes_that_a_caller_prefers(lean_passes):
    with torch.no_grad(), ops.prefer_impl("lean"):
        ECA(4, 3)(torch.randn(1, 4, 2, 2))
    assert lean_passes == [16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"padding_mode": "circular"}], ids=str)
def test_gates_without_gradients_are_those_with_them(options, samples, dtype):
    """Without gradients a gate is one convolution over all samples, with them a matrix product."""
    attention = ECA(16, 5, **options).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    p = torch.randn(samples, 16)
    with torch.no_grad():
        found = attention.gate(p)
    assert found.dtype == p.dtype
    torch.testing.assert_close(found, attention.gate(p).detach())
    assert not samples or found.std() > 0.1, "gates that are all alike would show nothing"
