"""torch.fx traces every gate: the graph computes the same, and the gate's parameters are the graph's."""

import pytest
import torch
from torch import fx, nn

import ecanet
from ecanet.attention import ATTENTIONS, ChannelAttention, make_attention
from ecanet.errors import ConfigError


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return module.double().eval()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_traced_gate_computes_the_same(name):
    gate = randomize(make_attention(name, 32))
    graph = fx.symbolic_trace(gate)
    assert dict(graph.named_parameters()).keys() == dict(gate.named_parameters()).keys()
    for size in (9, 17):  # one graph for all sizes
        x = torch.randn(2, 32, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        expected, actual = gate(x), graph(x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for (name, a), b in zip(gradients(graph, actual).items(), gradients(gate, expected).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def gradients(module, y):
    """The gradient of the sum of squares of ``y`` in each parameter, by name, sorted."""
    parameters = dict(sorted(module.named_parameters()))
    found = torch.autograd.grad(y.square().sum(), list(parameters.values())) if parameters else ()
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 4), (2, 8, 2, 3, 4)], ids=str)
def test_one_graph_takes_every_rank(shape):
    gate = randomize(ecanet.ECA(8))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fx.symbolic_trace(gate)(x), gate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["eca", "cbam", "gc", "gsop", "asr", "ese", "gct", "srm", "fca", "simam", "coord", "ela", "ema"]
)
def test_a_traced_gate_takes_a_mask(name):
    gate = randomize(make_attention(name, 32))
    x = torch.randn(2, 32, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    torch.testing.assert_close(fx.symbolic_trace(gate)(x, mask), gate(x, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_both_paddings(padding_mode):
    gate = randomize(ecanet.ECA(8, 5, padding_mode=padding_mode))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fx.symbolic_trace(gate)(x), gate(x), rtol=1e-12, atol=1e-12)


def test_a_gate_of_the_users_is_traced():
    class Doubled(ChannelAttention):
        def __init__(self, channels):
            super().__init__(channels)
            self.fc = nn.Linear(channels, channels)

        def gate(self, p):
            return 2 * self.fc(p).sigmoid()

    gate = randomize(Doubled(8))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    graph = fx.symbolic_trace(gate)
    assert "fc" in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), gate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support")  # of a GraphModule, any one
@pytest.mark.parametrize("name", ["eca", "eca-ns", "se", "se-var1", "se-var2", "se-var3", "se-gc", "gsop", "cbam"])
def test_torchscript_takes_the_graph_of_a_gate(name):
    gate = randomize(make_attention(name, 32))
    scripted = torch.jit.script(fx.symbolic_trace(gate))
    for shape in [(2, 32, 5), (1, 32, 4, 7)][name == "cbam" :]:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(scripted(x), gate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_torchscript_is_refused_in_one_line(name):
    gate = make_attention(name, 32)
    with pytest.raises(ConfigError, match=f"^torch.jit.script cannot read {type(gate).__name__}; use [^\n]*$"):
        torch.jit.script(nn.Sequential(nn.ReLU(), gate))
