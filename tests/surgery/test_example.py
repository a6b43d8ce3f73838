"""The example's runs: with hooks that need gradients, in inference mode, and in training mode where that matters."""

import pytest
import torch
from torch import nn
from torchvision import models

import ecanet
from ecanet.errors import AttachError
from ecanet.surgery.example import depends_on_training, record_run, run_in_training


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


def network(*blocks):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *(blocks or (Block(), Block()))).eval()


def names(model):
    return [site.after for site in ecanet.attached(model)]


def keep_gradient(module, args, output):
    output.retain_grad()


def listen_to_gradient(module, args, output):
    output.register_hook(lambda gradient: None)


def insist(module, args, output):
    assert output.requires_grad


def differentiate(module, args, output):
    torch.autograd.grad(output.sum(), module.weight, retain_graph=True)


@pytest.mark.parametrize("hook", [keep_gradient, listen_to_gradient, insist, differentiate])
def test_hooks_that_need_gradients_are_no_obstacle(hook):
    for example in (None, torch.rand(1, 3, 8, 8)):
        model = network()
        handle = model[1].conv1.register_forward_hook(hook)
        ecanet.attach(model, example=example)
        assert names(model) == ["1.conv2", "2.conv2"]
        handle.remove()
        assert all(p.grad is None for p in model.parameters())


def test_a_model_that_is_made_and_attached_in_inference_mode():
    with torch.inference_mode():
        model = network()
        x = torch.rand(2, 3, 8, 8)
        before = model(x)
        ecanet.attach(model, example=x)
        assert torch.equal(model(x), before)
    assert names(model) == ["1.conv2", "2.conv2"]


def test_an_example_with_a_history_is_copied():
    weight = torch.ones(1, requires_grad=True)
    x = torch.rand(1, 3, 8, 8) * weight
    model = ecanet.attach(network(), example={"input": x})
    assert len(names(model)) == 2


class Decoding(nn.Module):
    """Code that asks for the training mode in one of many ways, and runs its child in evaluation only."""

    def __init__(self):
        super().__init__()
        self.block = Block()


class Asking(Decoding):
    def forward(self, x):
        return x if self.training else self.block(x)


class Returning(Decoding):
    def forward(self, x):
        if self.training is True:
            return x
        return self.block(x)


class Storing(Decoding):
    def forward(self, x):
        mode = self.training
        return {True: lambda: x, False: lambda: self.block(x)}[mode]()


class ByName(Decoding):
    def forward(self, x):
        return x if getattr(self, "training") else self.block(x)  # noqa: B009


class InAMethod(Decoding):
    def forward(self, x):
        return self.decode(x)

    def decode(self, x):
        return next(self.block(y) for y in (x,) if not self.training) if not self.is_fitting else x

    @property
    def is_fitting(self):
        return self.training and True


def pass_on(x, block, training=False):
    return x if training else block(x)


class ByArgument(Decoding):
    def forward(self, x):
        return pass_on(x, self.block, training=self.training)


class ByHand(Decoding):
    @torch.no_grad()
    def forward(self, x):
        return (lambda: x if self.training else self.block(x))()


class OfAnother(Decoding):
    def forward(self, x):
        return x if self.block.conv1.training else self.block(x)


@pytest.mark.parametrize("kind", [Asking, Returning, Storing, ByName, InAMethod, ByArgument, ByHand, OfAnother])
def test_code_that_only_runs_in_evaluation_gets_no_gate(kind):
    model = ecanet.attach(network(Block(), kind()))
    assert names(model) == ["1.conv2"]
    assert [name for name, _ in ecanet.attached(model).left_out] == ["2.block.conv2"]
    assert "training" in str(ecanet.attached(model))
    assert ecanet.attached(ecanet.attach(network(Block(), kind()), where="1")).left_out == []
    with pytest.raises(AttachError, match="'2.block.conv2' does not run in training mode"):
        ecanet.attach(network(Block(), kind()), where="2.block")
    with pytest.raises(AttachError, match="'2.block.conv1' does not run in training mode"):
        ecanet.attach(network(Block(), kind()), where="2.block.conv1")


def test_a_method_on_an_instance_is_searched_too():
    model = network(Block(), Decoding())
    model[2].forward = lambda x: x if model[2].training else model[2].block(x)
    assert names(ecanet.attach(model)) == ["1.conv2"]


class Dropping(Block):
    """It asks for the mode only to pass it to PyTorch."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), p=0.1, training=self.training)


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x * (torch.rand(()) < 0.5) if self.training else x


def test_no_training_run_is_made_where_both_modes_run_the_same_modules():
    for model in (models.resnet18(), models.mobilenet_v3_small(), network(Dropping(), StochasticDepth())):
        assert not depends_on_training(model)
        assert record_run(model).trained is None
    assert depends_on_training(models.inception_v3(init_weights=False))


class NeedsBoxes(nn.Module):
    """A detector, which wants targets in training."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        return self.body(images)


def test_places_of_evaluation_are_kept_where_training_cannot_run():
    model = NeedsBoxes()
    assert run_in_training(model, (torch.rand(1, 3, 8, 8),), {}) == "targets should not be none when in training mode"
    assert names(ecanet.attach(model)) == ["body.1.conv2", "body.2.conv2"]


def test_the_training_run_leaves_no_trace_in_parameters():
    class Averaging(Asking):
        def forward(self, x):
            if self.training:
                self.block.conv1.weight.data.mul_(0.5)
                self.block.conv1.weight.view(-1)[0] = 7
            return super().forward(x)

    model = network(Block(), Averaging())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ecanet.attach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
