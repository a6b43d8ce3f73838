"""The simulated GPU sees what the Python code of a backward does, as a machine with a GPU would."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ecanet import ECA, ops

pytest.importorskip("triton")

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
