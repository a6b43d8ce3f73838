"""Networks without memory: attach on the meta device, then take the tensors from a file, or memory and then a file."""

import pytest
import torch
from torch import nn
from torchvision import models

import ecanet
from ecanet.attention import ATTENTIONS
from later_attentions import mark_slow
from tensors import noise

ATTACHABLE = [name for name in ATTENTIONS if name != "aa"]


def short():
    """A ResNet with one block in each stage."""
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])


NETWORKS = {
    "resnet18": models.resnet18,
    "mobilenet_v2": models.mobilenet_v2,
    "squeezenet": models.squeezenet1_1,
    "densenet": models.densenet121,
}


def make(network, attention="eca", **options):
    """The plain network and the attached one, in evaluation mode; SE-Var1 cannot be neutral."""
    model = network().eval()
    return ecanet.attach(model, attention, preserve=False if attention in ("se-var1", "simam") else None, **options)


def make_on_meta(network, attention="eca", **options):
    with torch.device("meta"):
        return make(network, attention, **options)


def give_memory(model):
    """Give ``model`` memory that holds nonsense."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 7)
    return model


def gates_of(model):
    return [model.get_submodule(site.name) for site in ecanet.attached(model)]


def stir(model):
    """Give the gates of ``model`` random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates_of(model):
            for parameter in gate.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)


def image():
    return noise(2, 3, 40, 40)


def check_file(model, written):
    """Load the file of ``written`` into ``model`` both ways and compare the outputs."""
    for load in ("assign", "copy"):
        if load == "assign":
            model.load_state_dict(written.state_dict(), assign=True)
        else:
            give_memory(model).load_state_dict(written.state_dict())
        with torch.no_grad():
            assert torch.equal(model(image()), written(image()))


@pytest.mark.parametrize("network", [pytest.param(n, marks=[pytest.mark.slow] * (n == "densenet")) for n in NETWORKS])
def test_the_same_gates_as_on_the_cpu(network):
    written, model = make(NETWORKS[network]), make_on_meta(NETWORKS[network])
    assert str(ecanet.attached(model)) == str(ecanet.attached(written))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert [gate.gain for gate in gates_of(model)] == [2.0] * len(gates_of(model))
    stir(written)
    check_file(model, written)


@pytest.mark.parametrize("attention", mark_slow(ATTACHABLE))
def test_every_attention_takes_its_tensors_from_a_file(attention):
    written, model = make(short, attention), make_on_meta(short, attention)
    assert model.state_dict().keys() == written.state_dict().keys()
    stir(written)
    check_file(model, written)


@pytest.mark.parametrize("attention", mark_slow(ATTENTIONS))
@pytest.mark.parametrize("network", ["resnet14", "resnet8"])
def test_created_networks_take_their_tensors_from_a_file(network, attention):
    options = {"name": network, "attention": attention, "num_classes": 3}
    options |= {"reduction": 4} if attention == "gc" else {}
    written = ecanet.create_model(**options).eval()
    with torch.device("meta"):
        model = ecanet.create_model(**options).eval()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    check_file(model, written)


ABSENT = ["eca", "se", "cbam", "gsop", "a2", "gct"]
ABSENT += [pytest.param(name, marks=pytest.mark.slow) for name in ("se-gc", "gc", "non-local", "srm")]


@pytest.mark.parametrize("attention", ABSENT)
def test_a_file_without_gates_and_neutral_gates_give_the_plain_outputs(attention):
    """The recipe of the guide."""
    plain = short().eval()
    model = give_memory(make_on_meta(short, attention))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    gates = tuple(f"{site.name}." for site in ecanet.attached(model))
    assert missing
    assert all(key.startswith(gates) for key in missing)
    for gate in gates_of(model):
        for module in gate.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        gate.neutralize()
    assert torch.equal(model(image()), plain(image()))


class Scaled(ecanet.ChannelAttention):
    """A user's gate, which attach tries on numbers."""

    def __init__(self, channels):
        super().__init__(channels)
        self.scale = nn.Parameter(torch.rand(channels))

    def gate(self, p):
        return (self.scale * p).sigmoid()

    def last_parameters(self):
        return (self.scale,)


def test_a_class_of_the_users_is_tried_on_numbers():
    check_file(make_on_meta(short, Scaled), make(short, Scaled))


def test_detach_gives_the_plain_network():
    plain = models.resnet18().eval()
    model = ecanet.detach(make_on_meta(models.resnet18, "se"))
    assert list(model.state_dict()) == list(plain.state_dict())
    check_file(model, plain)


def test_fold_gives_a_network_for_folded_files():
    model = ecanet.fold(make_on_meta(models.resnet18))
    assert [gate.gain for gate in gates_of(model)] == [1.0] * 8
    written = make(models.resnet18)
    stir(written)
    check_file(model, ecanet.fold(written))


@pytest.mark.filterwarnings("ignore:.*gave way to")
def test_squeeze_excite_gives_way():
    written = make(models.mobilenet_v3_small, replace="se")
    check_file(make_on_meta(models.mobilenet_v3_small, replace="se"), written)
