"""Every form of every gate computes what its module computes, in values that float64 explains."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import ecanet
from ecanet.attention import ASR, CBAM, ECA, ECANS, ESE, SE, SEGC, ChannelAttention, SEVar1, SEVar2, SEVar3
from ecanet.deploy import FORMS, build_gate
from ecanet.testing import assert_within_budget

GATES = {
    "eca": lambda c: ECA(c, 5),
    "eca of one tap": lambda c: ECA(c, 1),
    "eca wider than its channels": lambda c: ECA(c, 2 * c + 3),
    "eca with a bias": lambda c: ECA(c, 3, bias=True),
    "eca around the end": lambda c: ECA(c, 3, padding_mode="circular"),
    "eca-ns": lambda c: ECANS(c, 3),
    "se": lambda c: SE(c, 2),
    "se with biases": lambda c: SE(c, 2, bias=True),
    "se-var1": SEVar1,
    "se-var2": SEVar2,
    "se-var3": SEVar3,
    "se-gc": lambda c: SEGC(c, 2),
    "ese": ESE,
    "asr": lambda c: ASR(c, 2),
}
SHAPES = [(2, 6, 5, 4), (1, 6, 1, 1), (3, 6), (2, 6, 7), (1, 6, 2, 3, 4)]


def lively(gate):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
    return gate.eval().requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATES)
def test_a_form_computes_the_gate(name, form):
    gate = lively(GATES[name](6))
    for gain in (1.0, 2.0):
        gate.gain = gain
        written = build_gate(gate, form)
        assert written is not None
        for shape in SHAPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5
            oracle = copy.deepcopy(gate).double()(x.double())
            assert_within_budget(f"{name} as {form}", written(x), gate(x), oracle, roundings=4)


@pytest.mark.parametrize("shape", [(2, 6, 9, 5), (1, 6, 1, 1)])
@pytest.mark.parametrize("gain", [1.0, 2.0, 0.0])
def test_cbams_form_computes_its_two_gates(shape, gain):
    gate = lively(CBAM(6, 2))
    gate.gain = gain
    written = build_gate(gate, "conv2d")
    for seed in range(5):  # sums of large terms: their rounding is that of the terms, not that of the small result
        x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) - 1
        oracle = copy.deepcopy(gate).double()(x.double())
        assert_within_budget("cbam", written(x), gate(x), oracle, roundings=8)
    before = written(x)
    for parameter in gate.parameters():
        parameter.zero_()
    assert torch.equal(written(x), before), "the form holds copies"


@pytest.mark.parametrize(("channels", "weights"), [(64, 64 * 64), (320, 320 * 320), (321, 5), (512, 5)])
def test_mixed_gives_narrow_gates_alone_a_matrix(channels, weights):
    gate = lively(ECA(channels, 5))
    written = build_gate(gate, "mixed")
    assert sum(p.numel() for p in written.parameters()) == weights
    x = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(2))
    oracle = copy.deepcopy(gate).double()(x.double())
    assert_within_budget("mixed", written(x), gate(x), oracle, roundings=4)


def test_a_form_holds_copies():
    gate = lively(ECA(8, 3))
    written = build_gate(gate, "conv2d")
    before = written(torch.ones(1, 8, 2, 2))
    gate.conv.weight.zero_()
    assert torch.equal(written(torch.ones(1, 8, 2, 2)), before)


class Own(ECA):
    def gate(self, p):
        return p.tanh()


class OwnForward(ECA):
    def forward(self, x, mask=None):
        return x


def hooked():
    gate = ECA(8, 3)
    gate.conv.register_forward_pre_hook(lambda module, args: None)
    return gate


def patched():
    gate = SE(8)
    gate.gate = torch.tanh
    return gate


class OwnCBAM(CBAM):
    def spatial_gate(self, maps):
        return maps[:, :1].tanh()


def patched_cbam():
    gate = CBAM(8)
    gate.channel_gate = lambda means, maxima: means.sigmoid()
    return gate


def cbam_with_a_bias():
    gate = CBAM(8)
    gate.fc2 = nn.Linear(1, 8)
    return gate


def hooked_cbam():
    gate = CBAM(8)
    gate.fc1.register_forward_hook(lambda module, args, output: 2 * output)
    return gate


OTHERS = [patched, lambda: Own(8), lambda: OwnForward(8), hooked, lambda: ecanet.make_attention("gc", 32)]
OTHERS += [lambda: OwnCBAM(8), patched_cbam, cbam_with_a_bias, hooked_cbam]


@pytest.mark.parametrize("make", OTHERS)
def test_what_computes_something_else_is_exported_as_it_is(make):
    assert build_gate(make(), "conv2d") is None


class Net(nn.Module):
    """The ends of bottlenecks, where gates but CBAM may take their means early, and a gate that nothing precedes."""

    def __init__(self, attention):
        super().__init__()
        self.resnet = ResNet(BasicBlock if attention == "cbam" else Bottleneck, [1, 1, 1, 1], num_classes=4)
        ecanet.attach(self.resnet, attention)
        self.gate = ecanet.make_attention(attention, 3)

    def forward(self, x):
        return self.resnet(self.gate(x))


@pytest.mark.parametrize("attention", ["eca", "se", "cbam"])
@pytest.mark.parametrize("early", [False, True])
def test_the_prepared_copy_has_no_attention_module_left(attention, early):
    from ecanet.deploy.preparation import EarlyGate, count_attention, prepare, remove_attention

    torch.manual_seed(0)
    networks = [Net(attention), ecanet.create_model("resnet14", attention=attention, num_classes=4)]
    for network in networks[:1] if attention == "se" else networks:
        for gate in network.modules():
            if isinstance(gate, ChannelAttention | CBAM):
                lively(gate)
        network.eval()
        before = copy.deepcopy(network.state_dict())
        prepared = prepare(network, "conv2d", early=early)
        gates = count_attention(network)
        assert prepared.gates == {"conv2d": gates}
        assert count_attention(prepared.network) == 0
        widens = isinstance(network, Net) and early and attention != "cbam"
        assert sum(isinstance(module, EarlyGate) for module in prepared.network.modules()) == 4 * widens
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            oracle = copy.deepcopy(network).double()(x.double())
            bound = 1e-4 * float(oracle.norm())
            assert float((prepared.network(x) - oracle).norm()) < bound
            assert float((remove_attention(network)(x) - oracle).norm()) > 10 * bound, "the gates act"
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
