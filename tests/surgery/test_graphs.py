"""Graphs of `torch.fx`: gates behind nodes, and attention that is a row of nodes and no module."""

import copy
import io

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import ecanet
from ecanet.errors import AttachError

IMAGE = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))

MAKERS = {"trace": fx.symbolic_trace, "export": lambda model: torch.export.export(model, (IMAGE,)).module()}


def build(factory):
    torch.manual_seed(0)
    return factory().eval()


def run(model, image=IMAGE):
    with torch.no_grad():
        return model(image)


def enliven(model):
    """Give the gates weights far from neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in ecanet.attached(model):
            for parameter in model.get_submodule(site.name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# gates behind nodes


class ChannelsLast(nn.Module):
    """A residual block whose channels are the last axis."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, stride=4), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Functional(nn.Module):
    """Two residual blocks without a module at the end of a branch; the first one calls one activation twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.act = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x):
        x = self.act(self.stem(x))
        x = x + F.instance_norm(self.conv(self.act(self.conv(x))))
        return x + torch.mul(torch.tanh(F.conv2d(F.relu(x), self.conv.weight, padding=1)), self.scale)


def vgg():
    """The convolutions of VGG-11 without its layers of a hundred million weights."""
    convolutions = models.vgg.make_layers(models.vgg.cfgs["A"])
    return nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


NETWORKS = {
    models.resnet18: 8,
    models.mobilenet_v3_small: 11,
    models.mobilenet_v2: 17,
    vgg: 5,
    ChannelsLast: 1,
    Functional: 2,
}


@pytest.mark.parametrize(
    ("factory", "count", "maker"),
    [
        # a graph of many nodes takes seconds: an exported ResNet stands for all, a traced MobileNetV3 for both
        pytest.param(
            factory,
            count,
            maker,
            id=f"{factory.__name__}-{count}-{maker}",
            marks=[pytest.mark.slow] * (count > (8 if maker == "export" else 11)),
        )
        for factory, count in NETWORKS.items()
        for maker in MAKERS
    ],
)
def test_gates_in_a_graph_change_nothing_and_come_out_again(factory, count, maker):
    graph = MAKERS[maker](build(factory))
    plain, keys = run(graph), list(graph.state_dict())
    ecanet.attach(graph, "eca", example=IMAGE)
    sites = ecanet.attached(graph)
    assert len(sites) == count
    assert all(site.calls == 1 for site in sites)
    assert torch.equal(run(graph), plain)
    copies = [graph, copy.deepcopy(graph)]
    if maker == "trace":  # pickle takes no exported program that is a module again, with or without gates
        buffer = io.BytesIO()
        torch.save(graph, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
    for copied in copies:
        assert not torch.equal(run(enliven(copied)), plain)
        with pytest.warns(UserWarning, match=f"detached {count} gates"):
            ecanet.detach(copied)
        assert torch.equal(run(copied), plain)
        assert list(copied.state_dict()) == keys


@pytest.mark.parametrize("maker", MAKERS)
def test_gates_in_a_graph_have_the_keys_and_the_effect_of_those_in_the_network(maker):
    network = build(models.resnet18)
    graph = ecanet.attach(MAKERS[maker](copy.deepcopy(network)), example=IMAGE)
    enliven(ecanet.attach(network))
    assert set(graph.state_dict()) == set(network.state_dict())
    graph.load_state_dict(network.state_dict())
    torch.testing.assert_close(run(graph), run(network))
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    graph(image).square().sum().backward()
    network(image).square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(graph.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_traced_network_stay_the_same_in_training():
    plain = fx.symbolic_trace(build(models.resnet18)).train()
    attached = ecanet.attach(copy.deepcopy(plain))
    for model in (plain, attached):
        model(IMAGE).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, attached.get_parameter(name).grad), name


def test_where_selects_blocks_of_a_graph():
    graph = ecanet.attach(fx.symbolic_trace(build(models.resnet18)), where="layer4")
    assert [site.name for site in ecanet.attached(graph)] == ["layer4.0.eca", "layer4.1.eca"]
    graph = ecanet.attach(fx.symbolic_trace(build(models.resnet18)), where=nn.MaxPool2d)
    assert [site.after for site in ecanet.attached(graph)] == ["maxpool"]
    with pytest.raises(AttachError, match="already has attention 'eca'"):
        ecanet.attach(graph, where=nn.MaxPool2d)


def test_gates_are_folded_where_the_graph_calls_the_norm():
    graph = ecanet.attach(fx.symbolic_trace(build(models.resnet18)))
    plain = run(enliven(graph))
    torch.testing.assert_close(run(ecanet.fold(graph)), plain)
    exported = ecanet.attach(MAKERS["export"](build(models.resnet18)), example=IMAGE)
    with pytest.raises(AttachError, match=r"cannot fold 'layer1\.0\.eca'"):
        ecanet.fold(exported)


def test_a_graph_inside_a_network_gets_gates():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = fx.symbolic_trace(build(models.resnet18))
            self.head = nn.Linear(1000, 2)

        def forward(self, x):
            return self.head(self.backbone(x))

    network = Head().eval()
    plain = run(network)
    ecanet.attach(network)
    assert [site.name for site in ecanet.attached(network)][:2] == ["backbone.layer1.0.eca", "backbone.layer1.1.eca"]
    assert torch.equal(run(network), plain)
    network.backbone.recompile()
    assert not torch.equal(run(enliven(network)), plain)


def test_a_feature_extractor_with_a_graph_for_each_mode_keeps_its_gates_in_both():
    extractor = create_feature_extractor(build(models.resnet18), ["layer4"]).eval()
    plain = run(extractor)["layer4"]
    assert torch.equal(run(ecanet.attach(extractor))["layer4"], plain)
    assert len(ecanet.attached(extractor)) == 8
    assert not torch.equal(run(enliven(extractor))["layer4"], plain)
    before = run(extractor.train())["layer4"]
    with pytest.warns(UserWarning, match="detached 8 gates"):
        ecanet.detach(extractor)
    assert not torch.equal(run(extractor)["layer4"], before)


def test_a_gate_whose_node_is_gone_is_named():
    graph = ecanet.attach(fx.symbolic_trace(build(models.resnet18)))
    node = next(n for n in graph.graph.nodes if n.target == "layer2.0.eca")
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    graph.recompile()
    with pytest.raises(AttachError, match=r"gate 'layer2\.0\.eca' no longer acts"):
        ecanet.attached(graph)
