"""Building gates leaves nothing but gates: random states stay, gates train after inference mode, notes say the rest."""

import random

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import ecanet
from tensors import noise


class Drawing(ecanet.ChannelAttention):
    """A user's gate that draws numbers when it is built and when it runs."""

    def __init__(self, channels):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.rand(channels))

    def gate(self, p):
        return (self.weight.to(p.dtype) * p + 0 * torch.rand(())).sigmoid()

    def last_parameters(self):
        return (self.weight,)


def states():
    return torch.get_rng_state().tolist(), random.getstate()


@pytest.mark.filterwarnings("ignore:.*gave way to")
@pytest.mark.parametrize(
    ("network", "attention", "options"),
    [
        (models.resnet18, "eca", {}),
        (models.resnet18, "eca", {"preserve": False}),
        (models.resnet18, "cbam", {"where": "layer4"}),
        (models.mobilenet_v2, "se", {}),
        (models.mobilenet_v3_small, "se", {"replace": "se"}),
        (models.resnet18, "gc", {}),
        (models.resnet18, Drawing, {}),
        (models.squeezenet1_1, "se-gc", {}),
    ],
)
def test_random_states_after_attach_are_those_before_it(network, attention, options):
    model = network()
    before = states()
    ecanet.attach(model, attention, **options)
    assert states() == before


@pytest.mark.parametrize("attention", ["eca", "se", "se-var2", "se-gc", "cbam", Drawing])
def test_random_gates_follow_the_seed(attention):
    def first_values(seed):
        model = ecanet.create_model("resnet8", attention="none")
        torch.manual_seed(seed)
        ecanet.attach(model, attention, preserve=False, where="layer1")
        gates = gates_of(model)
        return torch.cat([p.detach().flatten() for gate in gates for p in gate.parameters()])

    assert torch.equal(first_values(1), first_values(1))
    assert not torch.equal(first_values(1), first_values(2))


def test_a_seeded_run_sees_the_same_numbers_with_and_without_gates():
    drawn = []
    for change in (lambda model: model, ecanet.attach, lambda model: ecanet.attach(model, "se")):
        torch.manual_seed(0)
        change(models.resnet18())
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.filterwarnings("ignore:.*gave way to")
@pytest.mark.parametrize(
    ("network", "options", "dtype"),
    [
        (models.resnet18, {}, torch.float32),
        pytest.param(models.resnet18, {}, torch.bfloat16, marks=pytest.mark.slow),
        (models.resnet18, {"attention": "se", "preserve": False}, torch.float32),
        (models.resnet18, {"attention": Drawing}, torch.bfloat16),
        (models.mobilenet_v3_small, {"replace": "se"}, torch.bfloat16),
        pytest.param(models.mobilenet_v3_small, {"replace": "se"}, torch.float64, marks=pytest.mark.slow),
        (models.squeezenet1_1, {"attention": "cbam"}, torch.float32),
        (models.squeezenet1_1, {"attention": "cbam"}, torch.float64),
    ],
)
def test_gates_attached_in_inference_mode_train(network, options, dtype):
    model = network(num_classes=2).to(dtype)
    with torch.inference_mode():
        ecanet.attach(model, **options)
    gates = gates_of(model)
    assert gates
    assert not any(tensor.is_inference() for gate in gates for tensor in (*gate.parameters(), *gate.buffers()))
    model.eval()(noise(2, 3, 40, 40).to(dtype)).square().sum().backward()
    assert all(p.grad is not None and p.dtype == dtype for gate in gates for p in gate.parameters())


class Counting(nn.Module):
    """A network that changes its input and a buffer in place."""

    def __init__(self):
        super().__init__()
        self.network = ecanet.create_model("resnet8", attention="none", num_classes=2)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        x -= 0.5
        return self.network(x)


@pytest.mark.parametrize("example_inside", [True, False, None])
def test_a_network_that_changes_tensors_in_place_runs_in_inference_mode(example_inside):
    model = Counting()
    with torch.inference_mode(bool(example_inside)):
        example = None if example_inside is None else torch.rand(2, 3, 32, 32)
    before = None if example is None else example.clone()
    with torch.inference_mode():
        ecanet.attach(model, example=example)
        assert model.runs == 0
    assert example is None or torch.equal(example, before)
    assert [site.after for site in ecanet.attached(model)] == [f"network.layer{i}.0.bn2" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "network", [models.resnet18, models.mobilenet_v2, pytest.param(models.densenet121, marks=pytest.mark.slow)]
)
def test_gates_stand_at_the_same_places_in_inference_mode(network):
    """There in-place additions are not seen by a tensor's version."""
    reports = []
    for inside in (False, True):
        with torch.inference_mode(inside):
            reports.append(str(ecanet.attached(ecanet.attach(network()))))
    assert reports[0] == reports[1]


def gates_of(model):
    return [model.get_submodule(site.name) for site in ecanet.attached(model)]


def test_outputs_stay_the_same_in_inference_mode():
    model, x = models.resnet18().eval(), noise(2, 3, 40, 40)
    with torch.inference_mode():
        before = model(x)
        ecanet.attach(model, example=torch.rand(1, 3, 40, 40))
        assert torch.equal(model(x), before)
        ecanet.detach(model)
        assert torch.equal(model(x), before)


def notes(model):
    return [site.note for site in ecanet.attached(model)]


FROZEN = "in a frozen block; trains"


def test_gates_that_train_in_frozen_blocks_are_named():
    assert notes(ecanet.attach(models.resnet18())) == [""] * 8
    model = models.resnet18().requires_grad_(False)
    assert notes(ecanet.attach(model)) == [FROZEN] * 8
    assert FROZEN in str(ecanet.attached(model))
    model = models.resnet18()
    model.layer2.requires_grad_(False)
    ecanet.attach(model)
    assert notes(model) == ["", "", FROZEN, FROZEN, "", "", "", ""]
    model.layer2[0].bn1.requires_grad_(True)  # no longer all of it
    assert notes(model) == ["", "", "", FROZEN, "", "", "", ""]
    model.layer2[1].eca.requires_grad_(False)
    assert notes(model) == [""] * 8
    model.requires_grad_(False)  # nothing trains
    assert notes(model) == [""] * 8


def test_two_gates_in_one_frozen_block_are_both_named():
    model = ecanet.attach(models.resnet18().requires_grad_(False), where="layer1")
    ecanet.attach(model, "se", where="layer1")
    assert notes(model) == [FROZEN] * 4


def test_the_note_stands_beside_others():
    model = models.resnet18().requires_grad_(False)
    ecanet.attach(model, preserve=False, where="layer1.0")
    assert notes(model) == [f"outputs changed when attached; {FROZEN}"]


def test_frozen_stages_of_detectors_are_named():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    ecanet.attach(backbone)
    found = {site.name: site.note for site in ecanet.attached(backbone)}
    assert {name.split(".")[1] for name, note in found.items() if note == FROZEN} == {"layer1"}
    assert {name.split(".")[1] for name, note in found.items() if not note} >= {"layer2", "layer3", "layer4"}
