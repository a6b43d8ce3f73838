"""The Triton operators inside `torch.compile`, in the interpreter: the eager values and gradients, in one graph."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

from ecanet import ECA, ops
from tensors import to_layout

pytest.importorskip("triton")


class Block(nn.Module):
    """Convolution, norm and ReLU, convolution and tail, all by the kernels."""

    def __init__(self, shortcut):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(9, 9, 3, padding=1), nn.Conv2d(9, 9, 1)
        self.bn1, self.bn2, self.side = (nn.BatchNorm2d(9) for _ in range(3))
        self.gate, self.shortcut = ECA(9), shortcut

    def forward(self, x):
        z = self.conv2(ops.residual_tail(self.conv1(x), self.bn1, impl="fused"))
        addend = None if self.shortcut is None else x
        side = self.side if self.shortcut == "normed" else None
        y = ops.residual_tail(z, self.bn2, self.gate.weigh, addend, side, impl="fused")
        return ops.squeeze_scale(y, self.gate.weigh, impl="fused")


def step(block, call, x, dy):
    """Return output, gradients and running statistics."""
    x = x.clone().requires_grad_()
    y = call(x)
    unused = [] if block.shortcut == "normed" else list(map(id, block.side.parameters()))
    parameters = [p for p in block.parameters() if id(p) not in unused]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy), *block.buffers()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shortcut", ["plain", "normed", None])
def test_compiled_kernels_give_eager_values_in_one_graph(shortcut, last, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(shortcut).double()
    copied = copy.deepcopy(block)
    x, dy = (to_layout(torch.randn(2, 9, 5, 3, dtype=torch.float64), last) for _ in range(2))
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(copied, backend=recorder if backend == "aot_eager" else backend, fullgraph=True)
    expected, actual = step(block, block, x, dy), step(copied, compiled, x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert actual[0].stride() == expected[0].stride()
    if backend == "aot_eager":
        forward, backward = (
            [node.target.__name__ for node in graphs[0].graph.nodes if "ecanet." in str(node.target)]
            for graphs in (recorder.fw_graphs, recorder.bw_graphs)
        )
        assert forward.count("apply.default") == 3
        assert backward.count("reduce.default") == 3
        assert "grads.default" in backward


def test_auto_compiles_to_the_reference():
    """`torch.compile` fuses PyTorch's own operations, so it must see them and not the kernels."""
    recorder = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    x = torch.randn(2, 9, 5, 3)
    with ops.prefer_impl("fused"):
        torch.compile(lambda x: ops.squeeze_scale(x, torch.sigmoid), backend=recorder, fullgraph=True)(x)
    assert not any("ecanet" in str(node.target) for node in recorder.fw_graphs[0].graph.nodes)
