"""Networks use the kernels where a proof has passed, and warn where it has not.

The CPU takes the place of the GPU: Triton's interpreter runs the kernels.
"""

import functools
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecanet
from ecanet import ops
from ecanet.ops import dispatch, nodes, proof

pytest.importorskip("triton")

CPU = torch.device("cpu")
CASES = proof.CASES


@pytest.fixture
def gpu(monkeypatch):
    """Treat the CPU as a GPU on which nothing has run yet, and shorten the proof."""
    monkeypatch.setattr(dispatch, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(proof, "_passed", {})
    monkeypatch.setattr(proof, "SHAPES", ((2, 9, 5, 3),))
    monkeypatch.setattr(proof, "CASES", CASES[:1])


@pytest.fixture
def ran(monkeypatch):
    """Return a list that records the names of the passes that `ops` chooses."""
    names, choose = [], dispatch.choose

    def chosen(*args, **settings):
        passes = choose(*args, **settings)
        names.append("reference" if passes is None else passes.__name__.rpartition(".")[2])
        return passes

    monkeypatch.setattr(dispatch, "choose", chosen)
    return names


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def tail(impl="auto", dtype=torch.float32):
    torch.manual_seed(0)
    z, shortcut = (torch.randn(2, 9, 4, 3).to(dtype) for _ in range(2))
    return ops.residual_tail(z, nn.BatchNorm2d(9), torch.sigmoid, shortcut, impl=impl)


# The interpreter takes half a minute for float32.
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=[pytest.mark.slow] * (d != torch.bfloat16)) for d in proof.DTYPES]
)
def test_kernels_pass_their_proof(dtype, monkeypatch):
    if dtype != torch.float32:  # the interpreter is slow
        monkeypatch.setattr(proof, "SHAPES", proof.SHAPES[1:])
    assert proof.find_failure(CPU, dtype) is None


def test_auto_is_fused_after_one_proof_for_each_dtype(gpu, ran, monkeypatch):
    tried, failure = [], proof.find_failure
    monkeypatch.setattr(proof, "find_failure", lambda *args: tried.append(args) or failure(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tail(), tail(), tail(dtype=torch.bfloat16)
        assert tried == [(CPU, torch.float32), (CPU, torch.bfloat16)]
        with ops.prefer_impl("lean"):
            tail(dtype=torch.float16)
        tail(dtype=torch.float64)
    assert len(tried) == 2
    assert ran == ["launch", "launch", "launch", "lean", "lean"]


def test_whole_network_runs_in_kernels(gpu, ran):
    model = ecanet.create_model("resnet8", attention="eca", num_classes=3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert ran == ["launch"] * 7  # the stem, and an inner pair and a tail of three blocks
    ran.clear()
    attached = ecanet.attach(Block(), "eca", where="norm")
    ran.clear()
    attached(torch.randn(2, 3, 8, 8))
    assert ran == ["launch"]


def scale(factor, index):
    """Return a change of a launch: its tensor ``index`` comes out ``factor`` times as large."""
    return lambda run, *tensors: (run(*tensors), tensors[index].mul_(factor))


def lose(index):
    """Return a change of a launch: its tensor ``index``, where it has one, is all zero."""
    return lambda run, *t: run(*t[:index], None if t[index] is None else 0 * t[index], *t[index + 1 :])


WRONG = {
    "outputs are 0.1 % off": ("_apply", scale(1.001, 2)),
    "a shortcut left out": ("_apply", lose(1)),
    "a twentieth of the mean is not summed": ("_moments", scale(0.95, 1)),
    "half a sum": ("_reduce", scale(0.5, -1)),
    "the mean's gradient left out": ("_grads", lose(7)),
    "a gradient that is NaN": ("_grads", scale(float("nan"), 2)),
    "second gradient is lost": ("_reduce", lose(1)),
    "the gate's taps are not read": ("_coefficients", lose(7)),
    "the affine's gradients are 1 % off": ("_coefficient_grads", scale(1.01, 4)),
}


@pytest.mark.parametrize("bug", WRONG)
def test_wrong_kernel_is_found_and_warned_of_once(bug, gpu, ran, monkeypatch):
    from ecanet.ops.triton.launch import Launch

    monkeypatch.setattr(proof, "CASES", CASES)
    name, change = WRONG[bug]
    call = Launch.__call__

    def call_wrong(self, *tensors):
        run = functools.partial(call, self)
        change(run, *tensors) if self.kernel.fn.__name__ == name else run(*tensors)

    monkeypatch.setattr(Launch, "__call__", call_wrong)
    with pytest.warns(
        UserWarning, match=r"fused kernels are not used on cpu: .* is (off by|not finite) .* lean passes run .*report"
    ):
        y = tail()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(y, tail("lean"))
        tail()
        tail("fused")  # an explicit choice is not replaced
        assert not ops.uses_kernels(torch.randn(2, 3, 4, 4))
    assert ran == ["lean", "lean", "lean", "launch"]


def test_kernel_that_raises_warns_and_falls_back(gpu, ran, monkeypatch):
    from ecanet.ops.triton.launch import Launch

    def broken(self, *tensors):
        raise RuntimeError("PTX was compiled for something else\nand more")

    monkeypatch.setattr(Launch, "__call__", broken)
    with pytest.warns(
        UserWarning, match=r"do not run in torch.float32 \(RuntimeError: PTX was .* something else\)\. The"
    ):
        tail()
    with pytest.raises(RuntimeError, match="PTX"):
        tail("fused")
    assert ran == ["lean", "launch"]


def test_missing_triton_warns_and_falls_back(gpu, ran, monkeypatch):
    monkeypatch.setitem(sys.modules, "ecanet.ops.triton.launch", None)
    monkeypatch.delattr(ecanet.ops.triton, "launch", raising=False)
    with pytest.warns(UserWarning, match="Triton cannot be imported"):
        tail()
    with pytest.raises(ImportError):
        tail("fused")
    assert ran == ["lean"]


def test_proof_is_isolated_from_the_callers_state(gpu, ran, monkeypatch):
    """no_grad, inference mode, autocast and hooks on saved tensors do not reach the proof, and it draws no numbers."""
    x = torch.randn(2, 9, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            monkeypatch.setattr(proof, "_passed", {})
            with context:
                ops.squeeze_scale(x, torch.sigmoid)
        monkeypatch.setattr(proof, "_passed", {})
        state = torch.get_rng_state()
        y = checkpoint(lambda z: ops.squeeze_scale(z, torch.sigmoid), x.requires_grad_(), use_reentrant=False)
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
    assert ran == ["launch"] * 5


def test_proof_waits_for_the_end_of_a_graph_capture(gpu, ran, monkeypatch):
    monkeypatch.setattr(proof, "is_capturing", lambda device: True)
    with pytest.warns(UserWarning, match="a CUDA graph is captured before they could be checked; run one step"):
        tail()
    monkeypatch.setattr(proof, "is_capturing", lambda device: False)
    tail()
    assert ran == ["lean", "launch"]


def test_tracers_compilers_and_subclasses_get_pytorch_operations(gpu, ran, monkeypatch):
    """Nothing is proven there."""
    monkeypatch.setattr(proof, "find_failure", lambda *args: pytest.fail("tried"))
    monkeypatch.setattr(dispatch, "SMALL", 0)  # small norms take no kernels in any case

    class Other(torch.Tensor):
        pass

    x = torch.randn(2, 9, 4, 3)
    ops.squeeze_scale(x.as_subclass(Other), torch.sigmoid)
    assert ran == ["lean"]
    model = ecanet.create_model("resnet8", attention="eca", num_classes=3).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(model, images, check_trace=False)
        torch.testing.assert_close(traced(images), torch.export.export(model, (images,)).module()(images))
        torch.compile(model, backend="eager")(images)


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    from ecanet.ops.triton import launch as fused

    entered, device_of, enter_device = [], torch.cuda.device_of, nodes.enter_device
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x.shape) or device_of(x))
    monkeypatch.setattr(nodes, "enter_device", lambda x: entered.append(x.shape) or enter_device(x))
    z = torch.randn(2, 9, 4, 3, requires_grad=True)
    ops.residual_tail(z, nn.BatchNorm2d(9), torch.sigmoid, z.detach(), impl="fused").sum().backward()
    assert entered == [z.shape] * 4  # one for each pass
    entered.clear()
    ops.residual_tail(z, nn.BatchNorm2d(9), shortcut=z.detach(), impl="fused").sum().backward()
    assert entered == [z.shape] * 2  # one for each direction of the node
    assert fused.check(z) is None


def test_a_tensor_on_the_current_device_needs_no_change_of_device(monkeypatch):
    class OnGpu(NamedTuple):
        index: int
        is_cuda: bool = True

        def get_device(self):
            return self.index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: x.index)
    assert [nodes.enter_device(OnGpu(index)) for index in (0, 2)] == [0, 2]
    for x in (OnGpu(1), torch.zeros(1)):
        with nodes.enter_device(x) as device:
            assert device is None
