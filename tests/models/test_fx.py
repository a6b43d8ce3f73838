"""torch.fx and torchvision's feature extractor take this library's networks and `optimize`'s copies."""

import pytest
import torch
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor

import ecanet
from later_attentions import mark_slow


def network(name="resnet14", attention="eca"):
    torch.manual_seed(0)
    return ecanet.create_model(name, attention=attention, num_classes=5).double()


@pytest.mark.parametrize("attention", mark_slow(ecanet.list_attentions()))
def test_a_network_is_traced_with_its_gates(attention):
    options = {"reduction": 8} if attention == "gc" else {}
    torch.manual_seed(0)
    model = ecanet.create_model("resnet14", attention=attention, num_classes=5, **options).double()
    graph = fx.symbolic_trace(model)
    assert dict(graph.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert graph.state_dict().keys() <= model.state_dict().keys()
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(graph.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_traced_network_trains_its_gates():
    graph = fx.symbolic_trace(network()).train()
    graph(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert any(p.grad.any() for name, p in graph.named_parameters() if "eca" in name)


@pytest.mark.parametrize(
    ("name", "nodes", "channels"),
    [
        ("resnet18", ["layer1.0.eca", "layer3", "layer4.1.relu_1"], [64, 256, 512]),
        ("mobilenet_v2", ["features.3"], [24]),
    ],
)
def test_torchvisions_feature_extractor(name, nodes, channels):
    model = network(name)
    extractor = create_feature_extractor(model, {node: node for node in nodes})
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    features = extractor.eval()(x)
    assert [features[node].shape[1] for node in nodes] == channels
    seen = []
    model.eval().get_submodule(nodes[0]).register_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    torch.testing.assert_close(features[nodes[0]], seen[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet14", "mobilenet_v2"])
def test_an_optimized_copy_is_traced(name):
    model = network(name).eval()
    copy = ecanet.optimize(model)
    graph = fx.symbolic_trace(copy)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_network_of_features_is_traced(name):
    torch.manual_seed(0)
    model = ecanet.create_model(name, features_only=True).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(fx.symbolic_trace(model)(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
