"""What somebody changed, wrapped or listens to is called: short ways stay out, and the outputs are the modules'."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

import ecanet
from ecanet import ops
from ecanet.attention import find_attention
from ecanet.models.resnet import BASIC, BasicBlock, ResNet
from ecanet.models.slots import Slot

DEPTHS = (1, 2, 1, 1)
"""Blocks in the stages of a ResNet-18, less those that are as the one before them."""
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain(kind="torchvision"):
    return copy.deepcopy(build_plain(kind))


@functools.cache
def build_plain(kind):
    torch.manual_seed(0)
    networks = {
        "torchvision": lambda: torchvision.models.resnet.ResNet(
            torchvision.models.resnet.BasicBlock, DEPTHS, num_classes=5
        ),
        # with last norms that are not zero, or no branch would matter
        "timm": lambda: timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock, DEPTHS, block_args={"attn_layer": "eca"}, num_classes=5, zero_init_last=False
        ),
    }
    return networks[kind]().double()


def same_as_torchvision():
    """This library's network with the weights, and so the outputs, of `plain`."""
    return copy.deepcopy(build_same())


@functools.cache
def build_same():
    model = ResNet(BASIC, DEPTHS, Slot(kind=find_attention("none")), num_classes=5, in_channels=3).double()
    model.load_state_dict(plain().state_dict())
    return model


SHORT = {"fused": lambda: ecanet.fuse(plain()), "ecanet": same_as_torchvision}


def outputs(model):
    """Logits in training and in evaluation."""
    return torch.stack([model.train()(IMAGES), model.eval()(IMAGES)]).detach()


@functools.cache
def outputs_before():
    return outputs(plain())


def assert_same(model, expected):
    torch.testing.assert_close(outputs(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_a_wrapped_block_is_called(make, monkeypatch):
    calls = []
    forward = wrapper.CheckpointWrapper.forward
    monkeypatch.setattr(wrapper.CheckpointWrapper, "forward", lambda m, *a, **k: calls.append(m) or forward(m, *a, **k))
    model = make()
    blocks = [type(model.layer1[0])]
    wrapper.apply_activation_checkpointing(model, check_fn=lambda m: type(m) in blocks)
    model(IMAGES).sum().backward()
    assert len(calls) == sum(DEPTHS)
    assert all(p.grad is not None for p in model.parameters())


def test_a_subclass_with_its_own_forward_is_called():
    class Halved(BasicBlock):
        def forward(self, x):
            return 0.5 * super().forward(x)

    expected, model = plain(), same_as_torchvision()
    expected.layer2[1].forward = halved(expected.layer2[1].forward)
    model.layer2[1].__class__ = Halved
    assert_same(model, outputs(expected))
    assert (outputs(plain()) - outputs(same_as_torchvision())).abs().max() < 1e-9  # unchanged, they agree


CHANGES = {
    "an identity for a ReLU": lambda block: setattr(block, "relu", nn.Identity()),
    "another activation": lambda block: setattr(block, "relu", nn.SiLU()),
    "a patched activation": lambda block: setattr(block.relu, "forward", torch.tanh),
    "a patched norm": lambda block: setattr(block.bn2, "forward", halved(block.bn2.forward)),
    "a hook on the activation": lambda block: block.relu.register_forward_hook(lambda m, i, y: 0.5 * y),
    "a patched block": lambda block: setattr(block, "forward", halved(block.forward)),
    "a patched convolution": lambda block: setattr(block.conv1, "forward", halved(block.conv1.forward)),
}


def halved(function):
    return lambda *args: 0.5 * function(*args)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_changed_afterwards_is_what_it_was_changed_to(change, make):
    expected, model = plain(), make()
    for network in (expected, model):
        change(network.layer1[0])
    expected, before = outputs(expected), outputs_before()
    assert (expected - before).abs().max() > 0.01
    assert_same(model, expected)


def alternate(names):
    """Return each change with one of ``names`` by turns, and with the others under the marker slow."""
    return [
        pytest.param(change, name, id=f"{key}-{name if isinstance(name, str) else name.__name__}",
                     marks=[pytest.mark.slow] * ((row + column) % len(names) > 0))
        for row, (key, change) in enumerate(CHANGES.items())
        for column, name in enumerate(names)
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "make"), alternate([*SHORT]))
def test_a_block_changed_after_its_first_run(change, make):
    """A block remembers that its parts may be run: a later change must be noticed."""
    expected, model = plain(), SHORT[make]()
    outputs(model)
    model.load_state_dict(expected.state_dict())  # running statistics have moved
    for network in (expected, model):
        change(network.layer1[0])
    assert_same(model, outputs(expected))


@pytest.mark.parametrize(("change", "short"), alternate([ecanet.fuse, ecanet.optimize]))
def test_a_block_changed_before_is_left_alone(change, short):
    model = plain()
    change(model.layer1[0])
    model.train()(IMAGES)
    expected = model.eval()(IMAGES)
    torch.testing.assert_close(short(model)(IMAGES), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "with functools.wraps"])
def test_a_patched_class_is_left_alone(monkeypatch, wrapped):
    model, own = plain().eval(), torchvision.models.resnet.BasicBlock.forward
    patch = halved(own)
    monkeypatch.setattr(
        torchvision.models.resnet.BasicBlock, "forward", functools.wraps(own)(patch) if wrapped else patch
    )
    with pytest.raises(ecanet.errors.ConfigError, match="no block"):
        ecanet.fuse(model)
    torch.testing.assert_close(ecanet.optimize(model)(IMAGES), model(IMAGES), rtol=1e-9, atol=1e-9)


def test_a_patched_class_of_this_library_is_called(monkeypatch):
    before = outputs(same_as_torchvision())
    monkeypatch.setattr(BasicBlock, "forward", halved(BasicBlock.forward))
    model = same_as_torchvision().train()
    with torch.no_grad():
        expected = model(IMAGES)
    torch.testing.assert_close(model(IMAGES), expected)
    assert (expected - before[0]).abs().max() > 0.01


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_every_activation_and_norm_is_heard(make):
    def heard(model):
        model(IMAGES)  # a block remembers that its parts may be run, and must notice a hook on all modules
        calls = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, i, y: calls.append(type(m).__name__))
        try:
            assert ops.must_be_called(nn.Identity())
            model.train()(IMAGES)
        finally:
            hook.remove()
        return [calls.count(name) for name in ("ReLU", "BatchNorm2d", "Conv2d")]

    assert heard(make()) == heard(plain()) == [11, 14, 14]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "act2", nn.GELU()),
        lambda block: setattr(block, "drop_path", nn.Dropout(1.0)),
        lambda block: setattr(block, "aa", nn.AvgPool2d(3, 1, 1)),
        lambda block: setattr(block, "se", nn.Tanh()),
        lambda block: setattr(block.se, "forward", torch.tanh),
        CHANGES["a patched norm"],
    ],
    ids=["activation", "drop path", "anti-aliasing", "attention", "patched attention", "patched norm"],
)
def test_a_block_of_timm_changed_after_fusing(change):
    expected, model = plain("timm"), ecanet.fuse(plain("timm"))
    for network in (expected, model):
        change(network.layer1[0])
    assert_same(model, outputs(expected))


def test_a_norm_that_shares_torchvisions_name():
    class FrozenBatchNorm2d(nn.Module):
        """As detection transformers write it: no ``eps`` of its own."""

        def __init__(self, channels):
            super().__init__()
            for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 2.0)):
                self.register_buffer(name, torch.full((channels,), value))

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    assert ops.is_frozen_norm(torchvision.ops.FrozenBatchNorm2d(3))
    assert not ops.is_frozen_norm(FrozenBatchNorm2d(3))
    model = torchvision.models.resnet18(num_classes=5, norm_layer=FrozenBatchNorm2d).double().eval()
    expected = model(IMAGES)
    torch.testing.assert_close(ecanet.optimize(model)(IMAGES), expected)
    torch.testing.assert_close(ecanet.fuse(model)(IMAGES), expected)


@torch.no_grad()
def test_a_hook_in_a_copy_runs_for_a_parameter_as_image():
    model = ecanet.optimize(ecanet.create_model("resnet8").double().eval())
    calls = []
    model.layer1[0].register_forward_hook(lambda *_: calls.append(1))
    model.layer1[0].attention.register_forward_hook(lambda *_: calls.append(1))
    model.layer1[0](nn.Parameter(torch.randn(2, 16, 8, 8, dtype=torch.float64)))
    assert len(calls) == 2
