"""The Triton operators inside `torch.compile`, in the interpreter: the eager values and gradients, in one graph."""

import copy
import shutil
from collections import Counter
from itertools import product

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

import ecanet
from ecanet import ECA, ops
from ecanet.ops import dispatch, proof
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


class Tail(Block):
    """The last tail alone: C++ takes seconds for each operation that inductor compiles."""

    def forward(self, x):
        return ops.residual_tail(self.conv2(x), self.bn2, self.gate.weigh, x, impl="fused")


def step(block, call, x, dy):
    """Return output, gradients and running statistics."""
    x = x.clone().requires_grad_()
    y = call(x)
    unused = [] if block.shortcut == "normed" else list(map(id, block.side.parameters()))
    unused += [id(p) for part in (block.conv1, block.bn1) for p in part.parameters()] * isinstance(block, Tail)
    parameters = [p for p in block.parameters() if id(p) not in unused]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy), *block.buffers()]


DEFAULT = [("plain", True, "aot_eager")]
"""Each compilation takes seconds, and inductor compiles C++ for half a minute. The network below has normed ones."""

BLOCKS = [
    pytest.param(
        *block,
        id=f"{block[0]}-{'channels_last' if block[1] else 'contiguous'}-{block[2]}",
        marks=[pytest.mark.slow] * (block not in DEFAULT),
    )
    for block in product(("plain", "normed", None), (False, True), ("aot_eager", "inductor"))
]


@pytest.mark.parametrize(("shortcut", "last", "backend"), BLOCKS)
def test_compiled_kernels_give_eager_values_in_one_graph(shortcut, last, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = (Tail if backend == "inductor" and shortcut == "plain" else Block)(shortcut).double()
    copied = copy.deepcopy(block)
    x, dy = (to_layout(torch.randn(2, 9, 5, 3, dtype=torch.float64), last) for _ in range(2))
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(copied, backend=recorder if backend == "aot_eager" else backend, fullgraph=True)
    with torch._inductor.config.patch(compile_threads=1):  # others would import PyTorch first
        expected, actual = step(block, block, x, dy), step(copied, compiled, x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert actual[0].stride() == expected[0].stride()
    if backend == "aot_eager":
        forward, backward = (
            [node.target.__name__ for node in graphs[0].graph.nodes if "ecanet." in str(node.target)]
            for graphs in (recorder.fw_graphs, recorder.bw_graphs)
        )
        assert forward.count("apply_packed.default") == 3
        assert backward.count("reduce_packed.default") == 3
        assert "grads.default" in backward


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it where a graph breaks
@pytest.mark.parametrize("shortcut", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_gate_that_breaks_the_graph_leaves_the_gradients_right(shortcut):
    """The two nodes of a tail are then in two graphs."""

    def weigh(p):
        torch._dynamo.graph_break()
        return p.sigmoid()

    def call(z):
        return ops.residual_tail(z, norm, weigh, z.flip(0) if shortcut else None, impl="fused")

    torch.manual_seed(0)
    torch._dynamo.reset()
    norm = nn.BatchNorm2d(9).double()
    z, dy = (to_layout(torch.randn(2, 9, 5, 3, dtype=torch.float64), True) for _ in range(2))
    z.requires_grad_()
    compiled = torch.compile(call, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(z), (z, norm.weight), dy) for f in (compiled, call))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_auto_compiles_to_the_reference():
    """`torch.compile` fuses PyTorch's own operations, so it must see them and not the kernels."""
    recorder = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    x = torch.randn(2, 9, 5, 3)
    with ops.prefer_impl("fused"):
        torch.compile(lambda x: ops.squeeze_scale(x, torch.sigmoid), backend=recorder, fullgraph=True)(x)
    assert not any("ecanet" in str(node.target) for node in recorder.fw_graphs[0].graph.nodes)


def list_operators(graphs):
    """Return how often each of our operators stands in ``graphs``."""
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return Counter(t.split(".")[1] for t in targets if t.startswith("ecanet."))


def compile_network(network):
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    return torch.compile(network, backend=recorder, fullgraph=True), recorder


@pytest.mark.parametrize("attention", ["eca", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "se"))])
def test_each_tail_of_a_compiled_network_is_kept_for_training(attention):
    """One graph; blocks hand each other two outputs, so no gradients of whole tensors are added between them."""
    torch.manual_seed(0)
    network = ecanet.create_model("resnet14", attention=attention, num_classes=3).double()
    del network.layer3, network.layer2[1]  # compiling takes seconds for each block
    network.stages.pop()
    network.fc = nn.Linear(32, 3).double()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    copied, x = copy.deepcopy(network), to_layout(torch.randn(2, 3, 9, 8, dtype=torch.float64), True)
    with ops.prefer_impl("fused"):
        compiled, recorder = compile_network(copied)
        for _, call in ((network, network), (copied, compiled)):
            call(x).square().sum().backward()
    assert len(recorder.fw_graphs) == 1
    # three blocks, of which one has a norm in its shortcut
    assert list_operators(recorder.fw_graphs) == {"moments": 4, "apply_packed": 3}
    assert list_operators(recorder.bw_graphs) == {"reduce_packed": 3, "grads": 4}
    with_second = [n for n in recorder.bw_graphs[0].graph.nodes if "ecanet.reduce" in str(n.target) and n.args[1]]
    assert len(with_second) == 1  # the first block of the first stage feeds another one
    for (name, a), b in zip(copied.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(copied.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_compiler_sees_the_synchronised_norm_of_pytorch():
    norm, x = nn.SyncBatchNorm(9), torch.randn(2, 9, 5, 3, requires_grad=True)
    with ops.prefer_impl("fused"):
        compiled, recorder = compile_network(lambda x: ops.residual_tail(x, norm))
        compiled(x).sum().backward()
    assert not list_operators(recorder.fw_graphs)


@pytest.mark.slow
def test_a_network_compiled_for_evaluation_or_with_hooks_shows_pytorch_operations():
    """In evaluation the compiler moves no more bytes; a hook in a block must see what it listens to."""
    x = torch.randn(2, 3, 8, 8)
    hooked = ecanet.create_model("resnet8", num_classes=3)
    for block in (hooked.layer1[0], hooked.layer2[0].eca, hooked.layer3[0].bn2):
        block.register_forward_hook(lambda module, args, y: y * 1)
    for network in (ecanet.create_model("resnet8", num_classes=3).eval(), hooked):
        with ops.prefer_impl("fused"):
            compiled, recorder = compile_network(network)
            compiled(x).sum().backward()
        assert not list_operators([*recorder.fw_graphs, *recorder.bw_graphs])


@pytest.mark.parametrize("right", [True, False])
def test_a_compiler_asks_for_the_proof_of_the_operators(right, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(proof, "is_proven", lambda *key: asked.append(key) or right)
    compiled, recorder = compile_network(ecanet.create_model("resnet8", num_classes=3).layer1)
    compiled(torch.randn(2, 16, 4, 4))
    assert list_operators(recorder.fw_graphs)["apply_packed"] == right
    assert set(asked) == {(torch.device("cpu"), torch.float32, "operators")}


@pytest.mark.slow
def test_the_proof_of_the_operators_runs_while_a_compiler_traces(monkeypatch):
    monkeypatch.setattr(dispatch, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(proof, "_passed", {})
    monkeypatch.setattr(proof, "SHAPES", proof.SHAPES[1:])
    monkeypatch.setattr(proof, "CASES", proof.CASES[:1])
    compiled, recorder = compile_network(ecanet.create_model("resnet8", num_classes=3))
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert proof._passed == {("operators", torch.device("cpu"), torch.float32): True}
    assert list_operators(recorder.fw_graphs)["apply_packed"] == 3
