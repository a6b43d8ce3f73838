"""Attention in recorded graphs, in memory layouts, on empty batches, on quantized tensors and at pruned widths."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import ecanet
from ecanet.attention import AugmentedConv2d, compute_maxima
from ecanet.attention.base import GatedAttention
from ecanet.errors import ConfigError

GATES = ["eca", "eca-ns", "se", "se-var1", "se-var2", "se-var3", "se-gc"]
OTHERS = ["cbam", "gc", "gsop", "a2", "non-local", "aa"]
LATER = ["asr", "ese", "gct", "srm", "fca", "simam", "coord", "ela", "ema"]
FIT_ANY_WIDTH = ["eca", "se-var1", "simam"]
CHANNELS = 32


def make(name):
    torch.manual_seed(0)
    gate = ecanet.make_attention(name, CHANNELS) if name != "aa" else AugmentedConv2d(CHANNELS, CHANNELS)
    for parameter in gate.parameters():  # some begin as the identity
        nn.init.normal_(parameter, std=0.3)
    return gate.eval()


def images(*, last=False):
    x = torch.randn(2, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last) if last else x


# graphs


MODES = [("real", False), ("symbolic", False), ("real", True), ("fake", False), ("symbolic", True), ("fake", True)]


def choose_traced():
    """Return each attention in each mode; all but every second of the first four are slow, and all of `LATER`."""
    return [
        pytest.param(
            name,
            mode,
            last,
            id=f"{name}-{mode}-{'channels_last' if last else 'contiguous'}",
            marks=[pytest.mark.slow]
            * (name in LATER or at > 3 or (row + at // 2) % 2 > 0 or (name, mode) == ("aa", "symbolic")),
        )
        for row, name in enumerate([*GATES, *OTHERS, *LATER])
        for at, (mode, last) in enumerate(MODES)
    ]


@pytest.mark.parametrize(("name", "tracing_mode", "last"), choose_traced())
def test_a_graph_by_make_fx_has_values_and_gradients(name, tracing_mode, last):
    gate = make(name)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in gate.named_parameters()}
    buffers = dict(gate.named_buffers())
    recorded = {key: value.detach() for key, value in parameters.items()}
    graph = make_fx(lambda p, b, x: functional_call(gate, {**p, **b}, (x,)), tracing_mode=tracing_mode)(
        recorded, buffers, images(last=last)
    )
    results = []
    for run in (graph, lambda p, b, x: functional_call(gate, {**p, **b}, (x,))):
        x = images(last=last).requires_grad_()
        y = run(parameters, buffers, x)
        results.append([y, *torch.autograd.grad((y * y.detach()).sum(), [x, *parameters.values()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not [node for node in graph.graph.nodes if str(node.target).endswith(".out")]


def test_a_graph_by_make_fx_of_a_whole_network():
    model = ecanet.create_model("resnet8", num_classes=4).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = make_fx(model)(x)
    graph(x.clone().requires_grad_()).sum().backward()  # the graph holds the parameters, which want gradients
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*GATES, *OTHERS, *LATER])
def test_traces_hold_no_operation_that_openvino_lacks(name):
    graph = torch.jit.trace(make(name), images()).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert not kinds & {"aten::mT", "aten::mH", "aten::numpy_T", "aten::T"}


# layouts and empty batches


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 5, 14, 20])
@pytest.mark.parametrize("last", [False, True])
def test_the_augmented_convolution_keeps_the_layout(last, size, stride):
    """As a convolution does, also where the attended map is enlarged, and where the weights are contiguous."""
    module = AugmentedConv2d(CHANNELS, 48, stride=stride).eval()
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, CHANNELS, size, size).contiguous(memory_format=layout)
    assert module(x).is_contiguous(memory_format=layout)
    contiguous = module(x.contiguous())
    torch.testing.assert_close(module(x), contiguous, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*GATES, *LATER, "cbam", "gc", "a2", "non-local", "aa"])
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero(name, train):
    module = make(name).train(train)
    x = torch.empty(0, CHANNELS, 6, 6, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    missing = [key for key, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(not parameter.grad.any() for parameter in module.parameters())


# quantized tensors


@pytest.mark.filterwarnings("ignore")  # PyTorch announces the end of eager quantization
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
@pytest.mark.parametrize("name", [*GATES, *OTHERS, *LATER])
def test_quantized_tensors_are_refused_with_the_remedy(name, dtype):
    gate = make(name)
    x = torch.quantize_per_tensor(images(), 0.1, 0, dtype)
    with pytest.raises(ConfigError) as caught:
        gate(x)
    assert str(caught.value) == (
        f"{type(gate).__name__} runs in float, got a quantized tensor ({dtype}); put a DeQuantStub before and a "
        f"QuantStub after it, or quantize with PT2E (torch.export)"
    )
    assert gate(x.dequantize()).shape == x.shape  # which is what the stub does


# widths


@pytest.mark.parametrize("name", FIT_ANY_WIDTH)
@pytest.mark.parametrize("width", [12, 48])
def test_gates_without_weights_of_channels_go_on_at_another_width(name, width):
    gate = make(name)
    assert type(gate).fits_any_width
    x = images().repeat(1, 2, 1, 1)[:, :width]
    with pytest.raises(ConfigError, match=f"got {width} channels .*if the network was pruned, set its channels to"):
        gate(x)
    gate.channels = width
    fresh = ecanet.make_attention(name, width, **({"kernel_size": gate.kernel_size} if name == "eca" else {}))
    fresh.load_state_dict(gate.state_dict())
    assert torch.equal(gate(x), fresh(x))


@pytest.mark.parametrize("name", [*GATES, *OTHERS[:-1], *LATER])
def test_other_gates_say_what_to_do_at_another_width(name):
    gate = make(name)
    x = images()[:, : CHANNELS - 8]
    with pytest.raises(ConfigError, match=r"channels are axis 1; if the network was pruned, .*or detach and attach"):
        gate(x)
    assert type(gate).fits_any_width == (name in FIT_ANY_WIDTH)
    if not type(gate).fits_any_width:
        gate.channels = CHANNELS - 8
        with pytest.raises((RuntimeError, ValueError)):  # its weights belong to channels
            gate(x)


def test_gates_of_users_have_weights_of_channels_unless_they_say_otherwise():
    class Maximum(GatedAttention):
        """A user's gate."""

        def forward(self, x, mask=None):
            self.check_channels(x)
            return x * compute_maxima(x, mask)[..., None, None].sigmoid()

    assert not Maximum.fits_any_width
    with pytest.raises(ConfigError, match="if the network was pruned, prune its weights too"):
        Maximum(4)(torch.ones(1, 3, 2, 2))
