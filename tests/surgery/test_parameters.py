"""`ecanet.parameter_groups`: every trainable parameter once, the gates apart, for attached and built-in gates."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.errors import AttachError, ConfigError


class MyGate(nn.Module):
    """A gate of a user's class, which the library knows only by its place."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


def names(model, parameters):
    by_identity = {id(p): name for name, p in model.named_parameters()}
    return [by_identity[id(p)] for p in parameters]


def attached(attention, **options):
    return ecanet.attach(torchvision.models.mobilenet_v2(), attention, **options)


MODELS = {  # a network, and a pattern that is in the names of its gates' parameters only
    "eca in resnet18": (lambda: ecanet.attach(torchvision.models.resnet18()), r"\.eca\."),
    "se in mobilenet": (lambda: attached("se"), r"\.fc"),
    "cbam in mobilenet": (lambda: attached("cbam"), r"\.fc|\.spatial\."),
    "own class in mobilenet": (lambda: attached(MyGate, preserve=False), r"\.scale"),
    "built-in eca": (lambda: ecanet.create_model("resnet20"), r"\.eca\."),
    "built-in own class": (lambda: ecanet.create_model("resnet20", attention=MyGate), r"\.my_gate\."),
    "built-in own class in mobilenet": (lambda: ecanet.create_model("mobilenet_v2", attention=MyGate), r"\.scale"),
    "a pickled copy": (lambda: copy.deepcopy(attached("eca")), r"\.conv\.weight"),
    "wrapped": (lambda: nn.Sequential(attached("eca")), r"\.conv\.weight"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_gates_are_a_group_of_their_own(name):
    make, mark = MODELS[name]
    model = make()
    network, gates = ecanet.parameter_groups(model, 0.02, weight_decay=1e-4)
    expected = [key for key, _ in model.named_parameters()]
    assert names(model, gates["params"]) == [key for key in expected if re.search(mark, key)] != []
    assert names(model, network["params"]) == [key for key in expected if not re.search(mark, key)]
    assert (network["lr"], network["weight_decay"]) == (0.02, 1e-4)
    assert (gates["lr"], gates["weight_decay"]) == (0.2, 0)


def test_rates_and_weight_decay_are_those_that_were_given():
    model = ecanet.attach(torchvision.models.resnet18())
    network, gates = ecanet.parameter_groups(model, 0.1, gate_lr=0.3)
    assert "weight_decay" not in network  # then the optimizer's own holds
    optimizer = torch.optim.AdamW([network, gates], weight_decay=0.05)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.05), (0.3, 0)]


def test_frozen_parameters_are_left_out_and_so_are_empty_groups():
    model = ecanet.attach(torchvision.models.resnet18())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".eca." in name and not name.startswith("layer1"))
    (gates,) = ecanet.parameter_groups(model, 0.1)
    assert len(gates["params"]) == 6
    assert gates["lr"] == 1
    (network,) = ecanet.parameter_groups(torchvision.models.resnet18(), 0.1)
    assert len(network["params"]) == 62
    with pytest.raises(ConfigError, match="no parameter of this ResNet can be trained: unfreeze some"):
        ecanet.parameter_groups(model.requires_grad_(False), 0.1)


def test_shared_parameters_are_in_one_group_once():
    """Gates that share a weight give it once; a weight that the network has too is the network's."""
    model = ecanet.attach(torchvision.models.resnet18())
    eca = [model.get_submodule(site.name).conv for site in ecanet.attached(model)]
    eca[0].weight = eca[1].weight
    model.taps = nn.Conv1d(1, 1, 3, bias=False)
    model.taps.weight = eca[2].weight
    groups = ecanet.parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [62 + 1, 8 - 2]
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), True, "0.1"])
@pytest.mark.parametrize("argument", ["lr", "gate_lr", "weight_decay"])
def test_numbers_that_are_no_rates_are_refused(argument, lr):
    with pytest.raises(ConfigError, match=f"{argument} must be a finite number of at least 0, got"):
        ecanet.parameter_groups(torchvision.models.resnet18(), **{"lr": 0.1, argument: lr})


def test_gates_that_no_longer_act_are_refused():
    model = ecanet.attach(torchvision.models.resnet18())
    del model.layer1[0].eca
    with pytest.raises(AttachError, match=r"layer1\.0\.eca"):
        ecanet.parameter_groups(model, 0.1)


def test_weight_decay_does_not_reach_the_gates():
    """With no gradient, one step shrinks the network's weights and leaves the gates as they are."""
    model = ecanet.attach(torchvision.models.resnet18(), preserve=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(ecanet.parameter_groups(model, 0.1), weight_decay=0.5).step()
    for name, parameter in model.named_parameters():
        expected = before[name] if ".eca." in name else before[name] * 0.95
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
