"""The simulated GPU sees where a tensor is, in Python code that PyTorch calls too, as a machine with a GPU would."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import FlopCounterMode

from ecanet import ECA, ops
from ecanet.ops import proof

pytest.importorskip("triton")

from ecanet.ops.triton import expansion, expansion_proof, tiles
from simulated_gpu import GPU, WrongDeviceError, simulate


class Double(torch.autograd.Function):
    """Twice ``x``, with a factor that the backward makes with ``options``."""

    @staticmethod
    def forward(ctx, x, options):
        ctx.options = options
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        assert dy.is_cuda
        assert dy.device == GPU
        assert dy.get_device() == GPU.index
        return dy * torch.full(dy.shape, 2.0, **ctx.options), None


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
@pytest.mark.parametrize("differentiate", [torch.autograd.grad, torch.autograd.backward], ids=lambda f: f.__name__)
def test_a_backward_must_name_its_device(differentiate, shape):
    with simulate():
        x = torch.ones(shape, requires_grad=True)
        differentiate(Double.apply(x, {"device": GPU}).sum(), inputs=[x])
        with pytest.raises(WrongDeviceError, match="found two: cuda:0 and cpu"):
            differentiate(Double.apply(x, {}).sum(), inputs=[x])


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 9, 2, 1)])
def test_second_derivatives_of_kernels_stay_on_the_gpu(shape, activation):
    with simulate():
        z, norm, gate = torch.rand(shape).requires_grad_(), nn.BatchNorm2d(shape[1]), ECA(shape[1])
        y = ops.residual_tail(z, norm, gate.weigh, z.detach(), None, activation, impl="fused")
        (dz,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(dz.square().sum(), z)
        assert second.is_cuda


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_gradients_in_a_batch_stay_on_the_gpu(impl):
    """PyTorch makes tensors for them in C++, on the device of the gradients."""
    with simulate():
        z, gate = torch.rand(2, 3, 2, 2).requires_grad_(), ECA(3)
        y = ops.residual_tail(z, nn.BatchNorm2d(3), gate.weigh, impl=impl)
        many = torch.rand(2, *y.shape)
        found = torch.autograd.grad(y, [z, gate.conv.weight], many, is_grads_batched=True)
        assert all(dx.is_cuda for dx in found)


@pytest.mark.parametrize("wrong", range(3))
def test_a_kernel_must_not_get_a_tensor_of_the_cpu(wrong):
    with simulate():
        h, weight, bias = torch.rand(1, 2, 1, 1), torch.rand(3, 2), torch.rand(3)
        given = [h, weight, bias]
        expansion.run_expansion(*given, None, None, None)
        given[wrong] = given[wrong].cpu()
        with pytest.raises(WrongDeviceError, match="on the CPU is handed to a kernel"):
            expansion.run_expansion(*given, None, None, None)
        y = torch.rand(1, 3, 1, 1)
        tiles.finish_in_place(y, bias, None)
        with pytest.raises(WrongDeviceError, match="on the CPU is handed to a kernel"):
            tiles.finish_in_place(y, bias.cpu(), None)


def test_hooks_on_saved_tensors_see_the_device():
    seen = []
    with simulate():
        x = torch.rand(3).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.device) or x, lambda x: x):
            x.square()
    assert seen == [GPU]


def test_a_module_moves_to_the_gpu_and_a_meta_tensor_is_not_there():
    with simulate():
        with torch.device("cpu"):
            layer = nn.Linear(2, 2)
        assert not layer.weight.is_cuda
        assert layer.to(device=GPU, dtype=torch.float32).weight.is_cuda
        assert layer.weight.to("meta").device.type == "meta"
        assert torch.empty(2, device="meta").is_meta


def test_autocast_applies_to_the_gpu():
    with simulate(), torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == torch.bfloat16


def test_only_the_modes_of_a_test_are_counted():
    """The library asks whether a mode must see its operators."""
    with simulate():
        assert torch._C._len_torch_dispatch_stack() == 0
        with FlopCounterMode(display=False):
            assert torch._C._len_torch_dispatch_stack() == 1


@pytest.mark.parametrize("function", ["compile", "jit.trace"])
def test_compiled_functions_are_skipped(function):
    room, name = (torch.jit, "trace") if "." in function else (torch, function)
    with simulate(), pytest.raises(pytest.skip.Exception, match="do not reach inside of compiled and traced"):
        getattr(room, name)(torch.relu, torch.ones(1))


def test_the_proofs_run_on_the_gpu(monkeypatch):
    """On a machine with a GPU they decide whether the kernels run at all."""
    monkeypatch.setattr(proof, "SHAPES", ((2, 3, 2, 1),))
    monkeypatch.setattr(proof, "FORMATS", (torch.channels_last,))
    monkeypatch.setattr(proof, "CASES", (proof.CASES[0], proof.CASES[-1]))
    monkeypatch.setattr(expansion_proof, "TRIED", dict([next(iter(expansion_proof.TRIED.items()))]))
    with simulate():
        assert proof.find_failure(GPU, torch.float32) is None
        assert proof.find_expansion_failure(GPU, torch.float32) is None
