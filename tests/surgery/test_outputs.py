"""attach refuses networks whose outputs are not numbers, and says so: NaN beside NaN proves nothing."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import ecanet
from ecanet.errors import AttachError

IMAGES = torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Finish(nn.Module):
    """A network of one residual block that returns what ``finish`` makes of the block's input and output."""

    def __init__(self, finish):
        super().__init__()
        self.block, self.finish = Branch(), finish

    def forward(self, x):
        return self.finish(x, self.block(x))


def refuse(model, example=None):
    """Return the line with which attach refuses ``model``, which must be as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AttachError) as caught:
        ecanet.attach(model.eval(), example=example)
    assert model.state_dict().keys() == before.keys()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill(name, value):
    """Return a function that writes ``value`` into the first element of a tensor of a network."""
    return lambda model: model.state_dict()[name].view(-1)[:1].fill_(value)


def overflow(model):
    """Let activations overflow; a later layer then subtracts infinity from infinity."""
    for parameter in model.parameters():
        parameter.data.mul_(1e9)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (fill("conv1.weight", torch.nan), "'conv1.weight' of the network holds NaN"),
        (fill("layer2.0.bn2.bias", torch.nan), "'layer2.0.bn2.bias' of the network holds NaN"),
        (fill("layer3.0.bn1.running_mean", torch.nan), "'layer3.0.bn1.running_mean' of the network holds NaN"),
        (fill("layer1.0.bn1.running_var", -1.0), ""),
        (fill("conv1.weight", torch.inf), ""),
        (overflow, ""),
    ],
    ids=["weight", "bias", "buffer", "negative variance", "infinite weight", "inf - inf"],
)
def test_a_network_that_answers_nan_is_refused(harm, named):
    model = resnet18(num_classes=5).eval()
    harm(model)
    line = refuse(model)
    assert line.startswith("the outputs of ResNet are NaN without any gate (output 1 of 1: 10 of 10 values are NaN")
    assert ("holds NaN" in line) == bool(named)
    assert named in line
    assert "example=" in line
    assert len(ecanet.attached(ecanet.attach(model, verify=False))) == 8


@pytest.mark.parametrize(
    ("finish", "found"),
    [
        (lambda x, y: (x.mean(), y), "output 2 of 2: 128 of 1024 values are NaN; 'block.conv2.bias'"),
        (lambda x, y: {"map": y[0], "size": [x, x]}, "output 1 of 3: 64 of 512 values are NaN; 'block.conv2.bias'"),
        (lambda x, y: (y[:, :1], y[:, 1:], x), "output 1 of 3: 128 of 128 values are NaN; 'block.conv2.bias'"),
    ],
    ids=["tuple", "dictionary", "one channel"],
)
def test_nan_in_one_of_several_outputs_is_named(finish, found):
    """One channel is NaN; the gate's convolution over channels would carry it to the two beside it."""
    model = Finish(finish).eval()
    fill("block.conv2.bias", torch.nan)(model)
    line = refuse(model, IMAGES)
    assert f"are not all numbers without any gate ({found} of the network holds NaN)" in line


def test_infinite_outputs_are_named():
    model = Finish(lambda x, y: (y, y.double())).eval()
    fill("block.conv2.bias", torch.inf)(model)
    line = refuse(model, IMAGES)
    assert "(output 1 of 2: 128 of 1024 values are infinite; output 2 of 2: 128 of 1024 values are infinite)" in line


def test_infinite_activations_behind_finite_outputs_are_named():
    model = Finish(lambda x, y: y.sigmoid()).eval()
    fill("block.conv2.bias", torch.inf)(model)
    line = refuse(model, IMAGES)
    assert line.startswith("the outputs of Finish would become NaN (output 1 of 1: ")
    assert "activations on the example are infinite or NaN" in line


@pytest.mark.parametrize("wrong", [lambda y: y * torch.nan, lambda y: y / 0 - y / 0, lambda y: (-(y**2) - 1).log()])
def test_an_output_of_nan_beside_one_of_numbers_is_no_obstacle(wrong):
    """The numbers prove that the gate changes nothing."""
    model = Finish(lambda x, y: (y, wrong(y))).eval()
    before = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    assert torch.equal(model(IMAGES)[0], before[0])
    assert len(ecanet.attached(model)) == 1


def test_a_changed_number_counts_more_than_nan(monkeypatch):
    monkeypatch.setattr(ecanet.ECA, "neutralize", lambda self: setattr(self, "gain", 2.002))
    model = Finish(lambda x, y: torch.cat([y, y * torch.nan]))
    assert "would change, though every gate is neutral" in refuse(model, IMAGES)
