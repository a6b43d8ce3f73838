"""fuse(): the blocks of other libraries, the same in values, gradients, statistics, state dict and hooks."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import ecanet
from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference.fusion import FusedBlock
from ecanet.models import Stage


def make_timms(name, **options):
    """Return timm's network with last norms that are not zero: else no branch and no gate would matter."""
    return timm.create_model(name, num_classes=5, zero_init_last=False, **options)


NETWORKS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision resnext": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=32, width_per_group=4),
    "timm eca": lambda: make_timms("resnet26", block_args={"attn_layer": "eca"}),
    "timm se": lambda: make_timms("resnet18", block_args={"attn_layer": "se"}),
    "timm averaged shortcut": lambda: make_timms("resnet26d"),
}


def step(model, images):
    """Logits, gradients and statistics of a training step, then the logits in evaluation."""
    x = images.clone().requires_grad_()
    y = model.train()(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [y.detach(), *gradients, *model.buffers(), model.eval()(images).detach()]


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_is_the_same(name):
    torch.manual_seed(0)
    plain = NETWORKS[name]().double().to(memory_format=torch.channels_last)
    fused = ecanet.fuse(copy.deepcopy(plain))
    blocks = [m for m in fused.modules() if isinstance(m, FusedBlock)]
    assert len(blocks) == sum(len(stage) for stage in (fused.layer1, fused.layer2, fused.layer3, fused.layer4))
    assert all(type(stage) is Stage for stage in (fused.layer1, fused.layer4))
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for a, b in zip(step(fused, images), step(plain, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_lean_tail_is_what_runs(monkeypatch):
    """Each tail once; gradients between blocks meet inside the tails where kernels run, and on a CPU outside."""
    model = ecanet.fuse(NETWORKS["timm eca"]())
    shapes, folds = [], []
    original, reduce = ops.lean.apply, ops.lean.reduce
    monkeypatch.setattr(ops.lean, "apply", lambda z, *rest: shapes.append(z.shape) or original(z, *rest))
    monkeypatch.setattr(ops.lean, "reduce", lambda dy, more, *rest: folds.append(more) or reduce(dy, more, *rest))
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    assert len(shapes) == 8  # resnet26: two blocks in each of four stages
    assert not any(more is not None for more in folds)
    folds.clear()
    monkeypatch.setattr(ops, "uses_kernels", lambda x: True)
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    assert sum(more is not None for more in folds) == 4


def test_copies_and_pickles():
    model = ecanet.fuse(NETWORKS["torchvision resnet18"]()).eval()
    images = torch.randn(2, 3, 40, 40)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layer1[0]) is type(model.layer1[0])
        assert torch.equal(other(images), model(images))
    assert ecanet.optimize(model)(images).shape == (2, 5)


def test_gates_attached_later_and_before():
    """A gate that attach hangs into a fused block, and a block that had one, are applied once."""
    images = torch.randn(2, 3, 40, 40)
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=5).eval()
    gated = copy.deepcopy(plain)
    ecanet.attach(gated, "eca", preserve=False, example=images)
    state = gated.state_dict()
    for order in ("fuse, attach", "attach, fuse"):
        model = copy.deepcopy(plain)
        if order == "fuse, attach":
            ecanet.attach(ecanet.fuse(model), "eca", preserve=False, example=images)
        else:
            ecanet.attach(model, "eca", preserve=False, example=images)
            with pytest.raises(ConfigError, match="no block"):
                ecanet.fuse(model)  # every block has a gate of its own
        model.load_state_dict(state)
        torch.testing.assert_close(model(images), gated(images))


def test_what_stays_as_it_is():
    with pytest.raises(ConfigError, match="VGG has no block"):
        ecanet.fuse(torchvision.models.vgg11())
    with pytest.raises(ConfigError, match="has no block"):
        ecanet.fuse(ecanet.create_model("resnet18"))
    dropped = timm.create_model("resnet18", drop_path_rate=0.5)
    fused = sum(isinstance(m, FusedBlock) for m in ecanet.fuse(dropped).modules())
    assert fused == 1  # timm drops no path in the first block
    heard = []
    model = torchvision.models.resnet18()
    model.layer2[0].register_forward_hook(lambda *_: heard.append(1))
    ecanet.fuse(model)
    assert type(model.layer2) is nn.Sequential
    model(torch.randn(1, 3, 40, 40))
    assert heard == [1]


def test_a_hook_on_the_gate_hears():
    model = ecanet.fuse(NETWORKS["timm se"]())
    heard = []
    model.layer1[0].se.register_forward_hook(lambda *_: heard.append(1))
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    assert heard == [1]


@pytest.mark.parametrize("network", ["own", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_automatic_fused_runs_the_whole_network_in_kernels(network, monkeypatch):
    """Stem, inner pairs and tails, in Triton's interpreter, against the reference.

    Some 40 layers sum up to 2 x 16 x 16 x 64 terms in another order, which is about sqrt(32768) roundings each. Planes
    of one position and two images would not do: their norm makes 1e-14 into 1e-10, in the reference itself.
    """
    pytest.importorskip("triton")
    from ecanet.ops.triton.launch import Launch

    torch.manual_seed(0)
    if network == "own":
        model = ecanet.create_model("resnet8", attention="eca", num_classes=3)
    else:
        model = ecanet.fuse(torchvision.models.resnet18(num_classes=3))
    model, images = model.double(), torch.randn(2, 3, *((8, 8) if network == "own" else (40, 40))).double()
    expected = step(copy.deepcopy(model), images)
    launched, run = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *x: launched.append(self.kernel.fn.__name__) or run(self, *x))
    with ops.prefer_impl("fused"):
        actual = step(model.train(), images)
    convolutions = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    normed = len(convolutions) - (network != "own")  # torchvision's stem is not a block's
    assert launched.count("_apply") == 2 * normed
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-12, atol=2e-12 * b.abs().max().clamp(min=1).item())
    with pytest.raises(ConfigError, match="'lean' or 'fused', got 'fast'"), ops.prefer_impl("fast"):
        pass
