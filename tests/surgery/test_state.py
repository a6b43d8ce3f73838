"""A run of a network leaves nothing behind: values, identities, caches, flags, random states."""

import collections
import random

import numpy
import pytest
import torch
from torch import nn

import ecanet
from ecanet.errors import AttachError
from ecanet.surgery.state import preserve_state


class Keeper(nn.Module):
    """A module that keeps many things when it runs, each of another kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("codebook", torch.zeros(4))
        self.register_buffer("bank", torch.zeros(3))
        self.register_buffer("lost", torch.full((2,), float("nan")))
        self.count, self.last = 0, None
        self.plain = torch.zeros(2)
        self.cache, self.sizes, self.seen = {}, {"by": {"size": [1]}}, {3}
        self.outputs, self.recent = [], collections.deque([1, 2], maxlen=2)
        self.hits, self.pair = collections.Counter({"a": 2}), ([0], {})
        self.ordered = collections.OrderedDict(b=1, a=2)
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.rate = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.conv(x)
        self.count += 1
        self.last = y
        self.codebook.data.mul_(0.9).add_(1)
        self.bank = torch.cat([self.bank, torch.ones(1)])
        self.lost += 1
        self.plain += 1
        self.cache[y.shape] = y
        self.sizes["by"]["size"].append(y.shape[-1])
        self.seen.add(y.shape[-1])
        self.outputs.append(y)
        self.recent.append(y.shape[0])
        self.hits["a"] += 1
        self.pair[0].append(1)
        self.pair[1]["new"] = y
        self.ordered.move_to_end("b")
        self.conv.weight.data.mul_(2)
        self.conv.bias.data = torch.ones(4)
        self.scale.mul_(3)
        self.rate[0] = 5
        self.bias.requires_grad_()
        self.register_buffer("late", torch.ones(1))
        self.conv.register_forward_hook(print)
        self.grown = nn.Linear(2, 2)
        self.training = not self.training
        return y * self.scale[:, None, None] + torch.rand(()) + random.random() + numpy.random.rand()  # noqa: NPY002


def describe(model):
    """Return everything that ``model`` holds, with identities, as one text."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[f"{name}.{key}"] = (id(value), repr(value))
    tensors = {key: (id(t), t.data_ptr(), t.tolist()) for key, t in model.named_parameters()}
    tensors |= {key: (id(t), t.data_ptr(), t.tolist()) for key, t in model.named_buffers()}
    return str(sorted(state.items())), str(tensors), [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_everything_that_a_module_keeps_is_put_back(training, flag):
    model = nn.Sequential(Keeper(), Keeper()).train(flag)
    model[1].conv = nn.Conv2d(4, 4, 1)
    before = describe(model)
    with preserve_state(model, training=training), torch.no_grad():
        model(torch.rand(1, 3, 2, 2))
    assert describe(model) == before


def test_a_run_that_fails_halfway_is_undone_too():
    model = nn.Sequential(Keeper(), nn.Conv2d(9, 1, 1))
    before = describe(model)
    with pytest.raises(RuntimeError, match="channels"), preserve_state(model), torch.no_grad():
        model(torch.rand(1, 3, 2, 2))
    assert describe(model) == before


def test_gradients_are_put_back():
    class Adapting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            self.conv(x).sum().backward()
            return x

    model = Adapting()
    with preserve_state(model):
        model(torch.rand(1, 3, 2, 2))
    assert model.conv.weight.grad is None


def test_a_change_that_cannot_be_undone_is_named():
    class Optimizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            self.conv.weight.view(-1)[:3].add_(1)
            return self.conv(x)

    model = nn.Sequential(Optimizing())
    with pytest.raises(AttachError, match=r"changes its parameter '0\.conv\.weight'") as raised:
        ecanet.attach(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("draw", [torch.rand, lambda n: random.random(), lambda n: numpy.random.rand()])  # noqa: NPY002
def test_random_states_are_put_back_each_by_itself(draw):
    model = nn.Conv2d(3, 3, 1)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(5)
    expected = draw(1)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(5)
    with preserve_state(model):
        draw(1)
    assert draw(1) == expected


def test_inference_and_meta_tensors_can_be_kept():
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        model[0].last = torch.zeros(1)
    with preserve_state(model), torch.inference_mode():
        model[0].running_mean += 1
        model[0].last += 1
        model(torch.rand(1, 3, 2, 2))
    assert not model[0].running_mean.any()
    assert not model[0].last.any()
    empty = nn.BatchNorm2d(3, device="meta")
    with preserve_state(empty), torch.no_grad():
        empty.running_mean += 1
        empty(torch.rand(1, 3, 2, 2, device="meta"))
    assert empty.running_mean.is_meta


class CachedBias(nn.Module):
    """Attention of EfficientFormer's kind: its bias is made once per device, and kept in evaluation only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, 1))
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bias_cache = {}

    def get_bias(self, device):
        if self.training:
            return self.weight * 2
        if device not in self.bias_cache:
            self.bias_cache[device] = self.weight * 2
        return self.bias_cache[device]

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.bias_cache.clear()
        return self

    def forward(self, x):
        return x + self.conv2((self.conv1(x) + self.get_bias(str(x.device))).relu())


@pytest.mark.parametrize("verify", [True, False])
def test_weights_that_are_loaded_after_attach_are_used(verify):
    model, other = (nn.Sequential(nn.Conv2d(3, 4, 1), CachedBias()).eval() for _ in range(2))
    ecanet.attach(model, verify=verify)
    assert model[1].bias_cache == {}
    model.load_state_dict(other.state_dict(), strict=False)
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(model(x), other(x))
