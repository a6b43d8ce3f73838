"""Squeeze-excite and ECA that are rows of nodes in a graph give way to gates, or stay as they are."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision import models

import ecanet
from ecanet.errors import AttachError

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MAKERS = {"trace": fx.symbolic_trace, "export": lambda model: torch.export.export(model, (IMAGE,)).module()}


class Network(nn.Module):
    """A network whose second layer is scaled by ``function(network, x)``, which returns the product."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.taps = nn.Conv1d(1, 1, 5, padding=2, bias=False)
        self.kernel = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x):
        return self.last(self.function(self, F.relu(self.second(F.hardswish(self.first(x))))))


def squeeze_by_mean(net, x):
    return x * torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))


def squeeze_by_pool(net, x):
    return torch.mul(F.hardsigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1))))), x)


def squeeze_by_clip(net, x):
    scores = net.up(F.hardswish(net.down(F.avg_pool2d(x, 28))))
    return x * torch.clamp(scores / 6 + 0.5, 0, 1)


def squeeze_flat(net, x):
    n, c, _, _ = x.size()
    hidden = F.relu(F.linear(F.adaptive_avg_pool2d(x, 1).view(n, c), net.down.weight.flatten(1), net.down.bias))
    factor = torch.sigmoid(F.linear(hidden, net.up.weight.flatten(1), net.up.bias)).view(n, c, 1, 1)
    return x * factor.expand_as(x)


def squeeze_in_place(net, x):
    return x.mul_(torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True))))))


def correlate_by_layer(net, x):
    scores = net.taps(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
    return x * torch.sigmoid(scores).expand_as(x)


def correlate_by_function(net, x):
    scores = F.conv1d(x.mean((2, 3)).unsqueeze(1), net.kernel, padding=1).squeeze(1)
    return x * scores.sigmoid()[:, :, None, None]


def scale_by_another_layer(net, x):
    other = net.second(x)
    return x[:, :, 1:-1, 1:-1] * torch.sigmoid(net.up(net.down(other.mean((2, 3), keepdim=True))))


def scale_by_place(net, x):
    return x * torch.sigmoid(x.mean(1, keepdim=True))


def scale_after_a_change_in_place(net, x):
    means = x.mean((2, 3), keepdim=True)
    F.hardtanh(x, -0.1, 0.1, inplace=True)
    return x * torch.sigmoid(net.up(F.relu(net.down(means))))


SE = [squeeze_by_mean, squeeze_by_pool, squeeze_by_clip, squeeze_flat, squeeze_in_place]
ECA = [(correlate_by_layer, "taps.weight"), (correlate_by_function, "kernel")]
OTHERS = [scale_by_another_layer, scale_by_place, scale_after_a_change_in_place]


def run(model, image=IMAGE):
    with torch.no_grad():
        return model(image.clone())


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("function", SE)
def test_squeeze_excite_of_nodes_gives_way(function, maker):
    graph = MAKERS[maker](Network(function).eval())
    plain, state = run(graph), graph.state_dict()
    with pytest.warns(UserWarning, match="1 'se' modules gave way to 'eca'"):
        ecanet.attach(graph, "eca", replace="se", example=IMAGE)
    (site,) = ecanet.attached(graph)
    assert (site.channels, site.calls) == (16, 1)
    assert not any(name.startswith(("down", "up")) for name in graph.state_dict())
    # What the network computes now is written down here once more.
    gate = graph.get_submodule(site.name)
    network = Network(lambda net, x: gate(x)).eval()
    network.load_state_dict(state, strict=False)
    torch.testing.assert_close(run(graph), run(network))
    copied = copy.deepcopy(graph)
    for model in (graph, copied):
        with pytest.warns(UserWarning, match="not neutral"):
            ecanet.detach(model)
        assert torch.equal(run(model), plain)
        assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("function", "name"), ECA)
def test_eca_of_nodes_is_converted_with_its_kernel(function, name, maker):
    network = Network(function).eval()
    graph = MAKERS[maker](copy.deepcopy(network))
    plain = run(graph)
    ecanet.attach(graph, replace="eca", example=IMAGE)
    (site,) = ecanet.attached(graph)
    gate = graph.get_submodule(site.name)
    assert torch.equal(gate.conv.weight, network.get_parameter(name))
    torch.testing.assert_close(run(graph), plain)
    assert torch.equal(run(ecanet.detach(graph)), plain)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("function", OTHERS)
def test_what_is_no_channel_attention_stays_in_the_graph(function, maker):
    graph = MAKERS[maker](Network(function).eval())
    plain, keys = run(graph), list(graph.state_dict())
    with pytest.raises(AttachError, match="found no 'se' modules|cannot replace") as refusal:
        ecanet.attach(graph, "eca", replace="se", example=IMAGE)
    assert "\n" not in str(refusal.value)
    assert torch.equal(run(graph), plain)
    assert list(graph.state_dict()) == keys


def test_squeeze_excite_that_is_not_meant_stays():
    graph = fx.symbolic_trace(Network(squeeze_by_mean).eval())
    plain, keys = run(graph), list(graph.state_dict())
    with pytest.raises(AttachError, match="replace='se' takes it"):
        ecanet.attach(graph, replace="eca")
    with pytest.raises(AttachError, match="preserve=True cannot be kept"):
        ecanet.attach(graph, "eca", replace="se", preserve=True)
    assert torch.equal(run(graph), plain)
    assert list(graph.state_dict()) == keys


@pytest.mark.parametrize("maker", MAKERS)
def test_all_nine_of_mobilenet_v3_give_way(maker):
    graph = MAKERS[maker](models.mobilenet_v3_small().eval())
    plain, keys = run(graph), list(graph.state_dict())
    with pytest.warns(UserWarning, match="9 'se' modules gave way"):
        ecanet.attach(graph, "eca", replace="se", example=IMAGE)
    assert sum(site.parameters for site in ecanet.attached(graph)) < 50
    assert not any(".fc1." in name for name in graph.state_dict())
    with pytest.warns(UserWarning, match="not neutral"):
        ecanet.detach(graph)
    assert torch.equal(run(graph), plain)
    assert list(graph.state_dict()) == keys
