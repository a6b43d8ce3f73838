"""The recorder sees every operation, finds the channels, and never fails where the model does not."""

import contextlib
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import handle_torch_function

import ecanet
from ecanet.surgery.recording import Operation, Recorder


def record(function, *inputs):
    """Return the trace of ``function`` on ``inputs``, and the value of its result."""
    recorder = Recorder()
    with torch.no_grad(), recorder:
        for x in inputs:
            recorder.follow(x)
        result = function(*inputs)
    return recorder.trace, recorder._value_of.get(result) if isinstance(result, torch.Tensor) else None


class Residual(nn.Module):
    """A block, and a function of its result that the network adds to it."""

    def __init__(self, function):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        x = x + self.conv2(self.conv1(x).relu())
        return x, self.function(x)


def without_name(x):
    return handle_torch_function(functools.partial(torch.Tensor.relu), (x,), x)


def through_sparse(x):
    sparse = x.mean((2, 3)).to_sparse()
    return (sparse + sparse).to_dense().view(-1)


def through_nested(x):
    nested = torch.nested.as_nested_tensor(list(x), layout=torch.strided)
    return (nested + nested).to_padded_tensor(0.0)


ODD = {
    "scalar to one": lambda x: x.mean().view(1),
    "scalar to four axes": lambda x: x.std().view(1, 1, 1, 1).expand(x.shape[0], 1, *x.shape[2:]),
    "scalar reshaped": lambda x: x.sum().reshape(1, 1).squeeze(),
    "scalar unsqueezed": lambda x: x.sum().unsqueeze(0).unflatten(0, (1, 1)),
    "scalar flattened": lambda x: torch.flatten(x.sum()),
    "scalar permuted": lambda x: x.sum().permute(()),
    "scalar expanded": lambda x: x.amax().expand(2, 4, 1),
    "no elements": lambda x: x[:0].view(0, 4, 36, 1).permute(3, 2, 1, 0).flatten(),
    "no channels": lambda x: x[:, :0].transpose(1, 2).reshape(-1),
    "names": lambda x: torch.permute(input=x, dims=(0, 2, 3, 1)).transpose(dim0=-1, dim1=1),
    "a list": lambda x: x.permute([0, 3, 1, 2]),
    "properties": lambda x: (x.mT, x[0, 0].T, x[0, 0].H, x.data),
    "axes in tensors": lambda x: x.permute(*torch.tensor([0, 2, 3, 1])),
    "complex": lambda x: torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.fft2(x).conj()).real,
    "complex views": lambda x: torch.view_as_real(torch.complex(x, x)).view(-1),
    "sparse": through_sparse,
    "nested": through_nested,
    "mapped": lambda x: torch.func.vmap(lambda one: one.view(4, -1).T + 1)(x),
    "differentiated": lambda x: torch.func.grad(lambda y: y.square().sum())(x),
    "linearised": lambda x: torch.func.jvp(lambda y: y.permute(1, 0, 2, 3).exp(), (x,), (x,)),
    "nameless": without_name,
    "operators": lambda x: torch.ops.aten.add.Tensor(torch.ops.aten.relu(x), x),
    "several": lambda x: torch.split(x, 2, 1)[1].unbind(0),
    "numbers": lambda x: (x.argmax().item(), x.shape[1], len(x), float(x.sum())),
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "inside": lambda x: [x.new_zeros(3).index_add_(0, torch.tensor([1]), x.sum().view(1)), {"a": (x.T,)}],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_operations_are_no_failure_of_the_example(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(ODD[name])).eval()
    ecanet.attach(model, example=torch.rand(2, 3, 6, 6))
    assert [site.after for site in ecanet.attached(model)] == ["1.conv2"]


def test_arguments_that_nobody_foresaw_leave_the_axis_unknown(monkeypatch):
    monkeypatch.setattr(Operation, "_derive_axis", lambda self, shape: shape.index("C"))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(torch.relu)).eval()
    ecanet.attach(model, example=torch.rand(2, 3, 6, 6))
    assert [site.channels for site in ecanet.attached(model)] == [4]


class MyConv(nn.Module):
    """Its weight is no followed tensor; it makes channels out of the second axis."""

    def forward(self, x):
        return nn.functional.conv2d(x, torch.ones(5, x.shape[1], 1, 1))


@pytest.mark.parametrize(
    ("function", "axis"),
    [
        (lambda x: x.permute(0, 2, 3, 1), 3),
        (lambda x: torch.permute(input=x, dims=[1, 0, 2, 3]), 0),
        (lambda x: x.permute(dims=(0, -2, -1, 1)), 3),
        (lambda x: x.transpose(1, -1), 3),
        (lambda x: x.transpose(dim0=2, dim1=1), 2),
        (lambda x: torch.swapaxes(x, axis0=1, axis1=2), 2),
        (lambda x: torch.swapdims(x, 0, 1), 0),
        (lambda x: x.movedim(1, -1), 3),
        (lambda x: torch.moveaxis(x, source=(0, 1), destination=(1, 0)), 0),
        (lambda x: x.clone().transpose_(1, 2), 2),
        (lambda x: x.clone().unsqueeze_(1).relu(), 2),
        (lambda x: x.permute(*torch.tensor([0, 2, 3, 1])), 3),
        (lambda x: x.transpose(1, 2).mT.relu(), 3),
        (lambda x: x.flatten(2).transpose(1, 2), 2),
        (lambda x: x.permute(0, 2, 3, 1).reshape(2, -1, 5), 2),
        (lambda x: x.unsqueeze(2), 1),
        (lambda x: x.permute(0, 3, 2, 1).conj().abs() + 1, 3),
    ],
)
def test_the_axis_of_the_channels_is_followed(function, axis):
    _, value = record(lambda x: function(MyConv()(x)), torch.rand(2, 3, 6, 7))
    assert (value.axis, value.channels) == (axis, 5)


@pytest.mark.parametrize(
    "function", [torch.sum, lambda x: x.mean((0, 1, 2)), lambda x: x.reshape(-1), lambda x: x[0, 0, 0]]
)
def test_a_tensor_of_fewer_axes_has_no_channels(function):
    _, value = record(function, torch.rand(2, 3, 4, 5))
    assert value.channels == 0


def test_images_without_a_batch_have_their_channels_first():
    for function, size in ((nn.Conv1d, (9,)), (nn.Conv2d, (9, 9)), (nn.ConvTranspose3d, (3, 3, 3))):
        _, value = record(function(2, 6, 1), torch.rand(2, *size))
        assert (value.axis, value.channels) == (0, 6)


STEPS = {
    "relu": lambda x: x.relu(),
    "add in place": lambda x: x.clone().add_(1),
    "sum": lambda x: x.sum(),
    "mean of an axis": lambda x: x.mean(-1),
    "first": lambda x: x[0],
    "none": lambda x: x[:0],
    "flat": lambda x: x.reshape(-1),
    "one more": lambda x: x.unsqueeze(-1),
    "one less": lambda x: x.squeeze(),
    "view": lambda x: x.view(x.shape[0], -1),
    "split": lambda x: x.unflatten(1, (2, -1)),
    "turned": lambda x: x.transpose(0, -1),
    "reversed": lambda x: x.permute(*range(x.dim() - 1, -1, -1)),
    "moved": lambda x: x.movedim(0, 1),
    "mT": lambda x: x.mT,
    "wider": lambda x: x.expand(2, *x.shape),
    "complex": lambda x: torch.complex(x, x),
    "real": lambda x: x.real,
    "whole": lambda x: x.long(),
    "float": lambda x: x.float(),
    "joined": lambda x: torch.cat([x, x]),
    "piled": lambda x: torch.stack([x, x], 1),
    "halved": lambda x: x.chunk(2, 1)[0],
    "multiplied": lambda x: x @ x.transpose(-1, -2),
    "added": lambda x: x + x.sum(),
}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(STEPS)), max_size=7), st.sampled_from([(2, 4, 3, 3), (1, 2, 5), (0, 4, 2, 2), ()])
)
def test_a_recorded_run_fails_only_if_the_plain_run_fails(steps, shape):
    def run(x):
        for step in steps:
            x = STEPS[step](x)
        return x

    x = torch.rand(shape)
    try:
        expected = run(x)
    except (RuntimeError, IndexError, ZeroDivisionError):
        return
    trace, value = record(run, x)
    assert value is not None
    assert value.shape == expected.shape
    assert all(value.axis < len(value.shape) or value.axis == 1 for value in trace.values)


class InPlace(nn.Module):
    """A branch, added in place, with an activation in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.1, True), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv2(self.act(self.conv1(x)))
        y += x
        return self.act(y) * 2


class Inferring(nn.Sequential):
    """A network that its author runs in inference mode."""

    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def test_inference_tensors_count_no_changes_and_yet_changes_are_seen():
    model = Inferring(nn.Conv2d(3, 4, 1), InPlace(), InPlace()).eval()
    ecanet.attach(model, example=torch.rand(2, 3, 5, 5))
    assert [site.after for site in ecanet.attached(model)] == ["1.conv2", "2.conv2"]


def test_a_module_that_is_called_by_keyword_and_does_nothing_makes_nothing():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.same = Pair(), nn.Identity()

        def forward(self, x):
            branch, _ = self.pair(x=x)
            return x + self.same(input=branch)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv2(input=self.conv1(input=x).relu()), None

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Keywords())
    ecanet.attach(model)
    assert [site.after for site in ecanet.attached(model)] == ["1.pair.conv2"]


def test_nothing_of_the_recorder_stays_in_pytorch():
    for function in (lambda x: x + 1, lambda x: x.view(7, 7)):
        with contextlib.suppress(RuntimeError):
            record(function, torch.rand(2, 3))
    hooks = [value for name, value in vars(torch_module).items() if name.startswith("_global") and "hooks" in name]
    assert not any(hooks)
    assert len(hooks) > 3


def test_a_call_that_fails_and_is_caught_does_not_confuse_the_recorder():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.block = nn.Conv2d(9, 4, 1), InPlace()

        def forward(self, x):
            try:
                x = self.wrong(x)
            except RuntimeError:
                x = self.block(x)
            return x

    model = ecanet.attach(nn.Sequential(nn.Conv2d(3, 4, 1), Careful()))
    assert [site.after for site in ecanet.attached(model)] == ["1.block.conv2"]
