"""Where gates go: odd places are left out and named, and do not keep gates from the others."""

import pytest
import torch
from torch import nn

import ecanet
from ecanet.errors import AttachError


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class ComplexConv(nn.Module):
    """A convolution of complex images, in two parts."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.real, self.imag = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(inputs, outputs, 1)

    def forward(self, z):
        return torch.complex(self.real(z.real) - self.imag(z.imag), self.real(z.imag) + self.imag(z.real))


class ComplexAct(nn.Module):
    def forward(self, z):
        return torch.complex(z.real.relu(), z.imag.relu())


class ComplexBlock(nn.Module):
    """A residual block of complex images."""

    def __init__(self, channels=8):
        super().__init__()
        self.branch = nn.Sequential(ComplexConv(channels, channels), ComplexAct(), ComplexConv(channels, channels))

    def forward(self, z):
        return z + self.branch(z)


class AddOfParts(ComplexBlock):
    """It adds the real parts of complex numbers."""

    def forward(self, z):
        return torch.complex(z.real + self.branch(z).real, z.imag)


def complex_images(*shape):
    return torch.randn(*shape, dtype=torch.complex64)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(ComplexConv(1, 8), ComplexBlock()),
        nn.Sequential(ComplexConv(1, 8), AddOfParts(), ComplexBlock()),
        nn.Sequential(ComplexConv(1, 8), ComplexAct(), ComplexConv(8, 8)),
        nn.Sequential(
            nn.Conv2d(1, 8, 1, dtype=torch.complex64), ComplexAct(), nn.Conv2d(8, 4, 1, dtype=torch.complex64)
        ),
    ],
)
def test_complex_networks_are_refused_and_stay_as_they_are(model):
    z = complex_images(2, 1, 6, 6)
    before = model(z)
    for where in (None, "1", "0"):
        with pytest.raises(AttachError, match="returns complex numbers") as raised:
            ecanet.attach(model, example=z, where=where)
        assert "\n" not in str(raised.value)
    assert torch.equal(model(z), before)
    assert not [m for m in model.modules() if isinstance(m, ecanet.ECA)]


def test_real_branches_of_a_complex_network_get_gates():
    class Magnitude(nn.Module):
        def forward(self, z):
            return z.abs()

    model = nn.Sequential(ComplexConv(1, 8), ComplexBlock(), Magnitude(), Block())
    z = complex_images(2, 1, 6, 6)
    before = model(z)
    report = ecanet.attached(ecanet.attach(model, example=z))
    assert [site.after for site in report] == ["3.conv2"]
    assert [name for name, _ in report.left_out] == ["1.branch"]
    assert "complex numbers of torch.complex64" in str(report)
    assert torch.equal(model(z), before)


class Recurrent(nn.Module):
    """RAFT's kind: one update is added to a running state, which starts as a constant or not."""

    def __init__(self, steps=3, starts_at_zero=True):
        super().__init__()
        self.encode, self.update, self.steps = Block(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()), steps
        self.starts_at_zero = starts_at_zero

    def forward(self, x):
        x = self.encode(x)
        state = torch.zeros_like(x[:1]).detach() if self.starts_at_zero else x
        for _ in range(self.steps):
            state = state + self.update(state + x)
        return state if self.starts_at_zero else self.update(state)


class Spiking(nn.Module):
    """One neuron that ends the branch of two blocks of different width, and runs in them too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.wider = Block(), Block(16), nn.Conv2d(8, 16, 1)
        self.neuron = nn.ReLU()

    def forward(self, x):
        x = x + self.neuron(self.first(x))
        x = self.wider(x)
        return x + self.neuron(self.second(x))


def test_one_odd_place_is_left_out_and_named():
    for odd, reason in ((Recurrent(starts_at_zero=False), "ends 3 residual branch(es) but runs 4 times"),
                        (Spiking(), "with different channels")):  # fmt: skip
        model = nn.Sequential(nn.Conv2d(3, 8, 1), odd, Block() if isinstance(odd, Recurrent) else Block(16)).eval()
        x = torch.rand(2, 3, 7, 7)
        before = model(x)
        report = ecanet.attached(ecanet.attach(model, example=x))
        assert "2.conv2" in [site.after for site in report]
        assert len(report.left_out) == 1
        assert reason in report.left_out[0][1]
        assert report.left_out[0][0] in str(report)
        assert torch.equal(model(x), before)


def test_an_odd_place_that_is_chosen_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Recurrent(starts_at_zero=False)), Block())
    model[1][0].encode = nn.Identity()
    with pytest.raises(AttachError, match=r"'1\.0\.update' ends 3 residual branch\(es\) but runs 4 times.*where="):
        ecanet.attach(model, where="1")
    model[1][0].encode = Block()
    report = ecanet.attached(ecanet.attach(model, where="1"))
    assert [site.after for site in report] == ["1.0.encode.conv2"]
    assert [name for name, _ in report.left_out] == ["1.0.update"]


def test_odd_places_elsewhere_are_no_matter_of_where():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Recurrent(starts_at_zero=False), Block())
    report = ecanet.attached(ecanet.attach(model, where="2"))
    assert [site.after for site in report] == ["2.conv2"]
    assert report.left_out == []


def test_a_shared_module_whose_runs_all_end_a_branch_keeps_its_one_gate():
    class Repeated(Block):
        def forward(self, x):
            for _ in range(3):
                x = super().forward(x)
            return x

    model = ecanet.attach(nn.Sequential(nn.Conv2d(3, 8, 1), Repeated()))
    assert [(site.after, site.calls) for site in ecanet.attached(model)] == [("1.conv2", 3)]


def test_images_without_a_batch_have_no_place():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block())
    with pytest.raises(AttachError, match=r"shape \(8, 6, 6\) without the axes \(batch, channels"):
        ecanet.attach(model, example=torch.rand(3, 6, 6))


def test_sums_of_whole_numbers_are_no_branches():
    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.round = nn.Conv2d(3, 8, 1), Round()

        def forward(self, x):
            i = self.conv(x).long()
            return i + self.round(i)

    class Round(nn.Module):
        def forward(self, i):
            return i.clamp(0, 9)

    model = ecanet.attach(Indices())
    assert [site.after for site in ecanet.attached(model)] == ["conv"]
    assert ecanet.attached(model).left_out == []


def test_a_stage_whose_last_layer_only_runs_in_evaluation_ends_before_it():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
            self.decode = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return x if self.training else self.decode(x)

    report = ecanet.attached(ecanet.attach(Head()))
    assert [site.after for site in report] == ["conv.1"]
    assert [name for name, _ in report.left_out] == ["decode"]
