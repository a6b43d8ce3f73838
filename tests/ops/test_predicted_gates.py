"""The kernel that computes a gate from the means of a convolution's input, against float64, and where it runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import ecanet
from ecanet import ops
from ecanet.attention import ECA, ECANS, SE, SEVar1, SEVar2
from ecanet.errors import ConfigError
from ecanet.models.block import Layer, Parts
from ecanet.models.execution import run
from ecanet.ops import proof
from ecanet.testing import find_elementwise_excess
from tensors import draw, surround_with_nan, to_layout

pytest.importorskip("triton")

from ecanet.ops.triton import expansion_proof, predicted_gates

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, K, C: no sample, one element, no multiple of a tile, several tiles in each direction
SIZES = [(0, 3, 5), (1, 1, 1), (3, 37, 70), (17, 32, 59), (70, 65, 151)]

GATES = {
    "eca": lambda c: ECA(c, 3),
    "eca with 15 taps": lambda c: ECA(c, 15),
    "circular eca with bias": lambda c: ECA(c, 3, padding_mode="circular", bias=True),
    "eca-ns": lambda c: ECANS(c, 5),
    "se-var1": SEVar1,
    "se-var2": SEVar2,
}


def make_gate(name, channels, generator):
    """Return the gate with random parameters, surrounded by NaN, and a gain of 1.5."""
    gate = GATES[name](channels).requires_grad_(False)
    for p in gate.parameters():
        p.data = surround_with_nan(draw(tuple(p.shape), generator))
    gate.gain = 1.5
    return gate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_error_is_within_rounding(name, size, dtype):
    samples, inner, channels = size
    generator = torch.Generator("cpu").manual_seed(0)
    m = surround_with_nan(draw((samples, inner), generator))
    weight = surround_with_nan((draw((channels, inner), generator) / inner**0.5).to(dtype))
    bias = surround_with_nan(draw((channels,), generator).to(dtype)) if channels != 59 else None
    gate = make_gate(name, channels, generator)
    form = ops.describe_gate(gate.weigh, channels)
    actual = predicted_gates.predict_gate(m, weight, bias, form)
    assert actual.dtype == torch.float32
    _, allowed = expansion_proof.compute_gate_exactly(m, weight, bias, form)
    expected = gate.double().weigh(F.linear(m.double(), weight.double(), None if bias is None else bias.double()))
    assert find_elementwise_excess("g", actual, expected, allowed) is None


def test_nan_stays_nan():
    """A mean that is no number reaches the factors of its sample, and no others."""
    m, weight = torch.rand(2, 5), torch.rand(7, 5)
    m[1, 2] = float("nan")
    g = predicted_gates.predict_gate(m, weight, None, ops.ChannelGate(torch.ones(3), taps=3))
    assert g[1].isnan().all()
    assert not g[0].isnan().any()


def test_tensors_of_two_devices_are_refused():
    m, weight = torch.rand(2, 5), torch.rand(7, 5)
    with pytest.raises(ConfigError, match="tensors are on .* and meta"):
        predicted_gates.predict_gate(m, weight, None, ops.ChannelGate(torch.ones(3, device="meta"), taps=3))


def test_operator_has_a_schema_shapes_and_flops():
    given = torch.rand(2, 5), torch.rand(7, 5, 1, 1), torch.rand(7), torch.rand(3), None, 3, False, True, 2.0
    torch.library.opcheck(torch.ops.ecanet.predict_gate, given, test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as flops:
        predicted_gates.predict_gate(*given[:3], ops.ChannelGate(given[3], taps=3))
    assert flops.get_total_flops() == 2 * 2 * 5 * 7


# in blocks


@pytest.fixture
def ran(monkeypatch):
    """Return a list that records the arguments of the kernel's launches."""
    launches, launch = [], predicted_gates.run_prediction
    monkeypatch.setattr(predicted_gates, "run_prediction", lambda *args: launches.append(args) or launch(*args))
    return launches


def make_block(gate, dtype=torch.float32):
    """Return a convolution from 5 to 16 channels with ``gate`` behind it, and an input."""
    torch.manual_seed(0)
    x = to_layout(torch.randn(2, 5, 3, 5), True).to(dtype)
    convolution = nn.Conv2d(5, 16, 1).requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
    return Parts((Layer(convolution, None, None),), gate, None, nn.ReLU()), x


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", GATES)
@torch.no_grad()
def test_a_block_computes_its_gate_in_the_kernel(name, dtype, ran):
    parts, x = make_block(make_gate(name, 16, torch.Generator("cpu").manual_seed(0)), dtype)
    with ops.prefer_impl("lean"):
        expected = run(parts, x, x)[0]
    assert not ran
    with ops.prefer_impl("fused"):
        actual = run(parts, x, x)[0]
    assert len(ran) == 1
    few = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=few, atol=few)


@torch.no_grad()
def test_other_gates_keep_pytorchs_operations(ran):
    """Gates of another form, gates whose weight a hook computes, and gates that somebody has changed."""
    pruned, changed = ECA(16), ECA(16)
    prune.l1_unstructured(pruned.conv, "weight", amount=1)
    changed.gate = lambda p: 0.5 * p.sigmoid()
    for gate in (SE(16), pruned, changed):
        parts, x = make_block(gate)
        expected = run(parts, x, x)[0]
        with ops.prefer_impl("fused"):
            torch.testing.assert_close(run(parts, x, x)[0], expected, rtol=1e-5, atol=1e-5)
    assert not ran


@torch.no_grad()
def test_optimized_networks_use_it(ran):
    network = ecanet.create_model("resnet8", num_classes=3).eval()
    x = to_layout(torch.randn(1, 3, 8, 8), True)
    with ops.prefer_impl("fused"):
        ecanet.optimize(network)(x)
    assert not ran  # a basic block has no 1x1 convolution
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), ECA(8, 3)).eval()
    for p in network[-1].parameters():
        p.normal_()
    x = to_layout(torch.randn(2, 3, 4, 4), True)
    expected = network(x)
    with ops.prefer_impl("fused"):
        actual = ecanet.optimize(network, example=x)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(ran) == 1


# proof

WRONG = {
    "half a bias": lambda f: lambda m, w, b, *rest: f(m, w, None if b is None else b / 2, *rest),
    "taps in the other order": lambda f: lambda m, w, b, taps, *rest: f(m, w, b, taps.flip(-1), *rest),
    "a gate without its bias": lambda f: lambda m, w, b, taps, bias, *rest: f(m, w, b, taps, None, *rest),
    "zeros for a circle": lambda f: lambda *args: f(*args[:7], False, args[8]),
    "a gain of 1": lambda f: lambda *args: f(*args[:8], 1.0),
    "products in TF32": lambda f: lambda m, w, *rest: f((m * 2**11).round() / 2**11, w, *rest),
    "no number": lambda f: lambda *args: f(*args) * float("nan"),
}


@pytest.mark.usefixtures("interpreter")
def test_the_kernel_passes_its_proof(monkeypatch):
    monkeypatch.setattr(expansion_proof, "TRIED", {})
    assert proof.find_expansion_failure(torch.device("cpu"), torch.float32) is None


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("bug", WRONG)
def test_a_wrong_kernel_fails_its_proof(bug, monkeypatch):
    monkeypatch.setattr(expansion_proof, "TRIED", {})
    monkeypatch.setattr(predicted_gates, "run_prediction", WRONG[bug](predicted_gates.run_prediction))
    assert "g is" in proof.find_expansion_failure(torch.device("cpu"), torch.float32)
