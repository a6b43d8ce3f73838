"""``attention=`` takes names, classes, callables and dotted paths, in networks and in attach."""

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.attention import find_attention
from ecanet.errors import AttachError, ConfigError


class MyGate(ecanet.ChannelAttention):
    """One weight per channel, written with as little as a user would write."""

    def __init__(self, channels, slope=1.0):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(channels))
        self.slope = slope

    def gate(self, p):
        return (self.slope * self.weight * p).sigmoid()

    def last_parameters(self):
        return (self.weight,)


class GateWithoutLast(ecanet.ChannelAttention):
    def gate(self, p):
        return p.sigmoid()


class WrongLast(MyGate):
    """The gate of zeroed weights is 0.76, not one half."""

    def gate(self, p):
        return (self.weight * p + 1).sigmoid()


class MyECA(ecanet.ECA):
    """A class of the user's own with a kernel."""


class Conv1(MyGate):
    """A class whose name in snake case is an attribute of every residual block."""


class Plain(nn.Module):
    """A module that knows nothing of this library."""

    def __init__(self, channels, bias=True):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x):
        return x * self.mix(x).sigmoid()


def build_plain(channels):
    return Plain(channels, bias=False)


IMAGE = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def test_an_own_class_is_attached_listed_and_detached():
    plain = network()
    model = ecanet.attach(copy.deepcopy(plain), MyGate, slope=2.0)
    assert torch.equal(model(IMAGE), plain(IMAGE))
    sites = ecanet.attached(model)
    assert [(s.name, s.attention, s.channels) for s in sites][:1] == [("layer1.0.my_gate", "MyGate", 64)]
    assert {model.get_submodule(s.name).slope for s in sites} == {2.0}
    with torch.no_grad():
        model.layer1[0].my_gate.weight.fill_(1.0)
    assert not torch.equal(model(IMAGE), plain(IMAGE))
    with pytest.raises(AttachError, match="already has attention 'MyGate'; detach first"):
        ecanet.attach(model, MyGate)
    with pytest.raises(AttachError, match="MyGate is not from this library"):
        ecanet.fold(model)
    with pytest.warns(UserWarning, match="8 gates"):
        ecanet.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(IMAGE), plain(IMAGE))


def test_networks_are_built_with_an_own_class_under_the_keys_of_attach():
    built = ecanet.create_model("resnet18", attention=MyGate)
    attached = ecanet.attach(network(), MyGate, preserve=False)
    built.load_state_dict(attached.state_dict())
    x = IMAGE.double()
    expected = attached.double().eval()(x)
    assert (built.double().eval()(x) - expected).abs().max() <= 1e4 * torch.finfo(x.dtype).eps * expected.abs().max()
    mobile = ecanet.create_model("mobilenet_v2", attention=MyGate)
    assert sum(isinstance(m, MyGate) for m in mobile.modules()) == 17


def test_a_key_never_takes_the_place_of_a_layer():
    built = ecanet.create_model("resnet18", attention=Conv1)
    assert isinstance(built.layer1[0].conv1, nn.Conv2d)
    assert isinstance(built.layer1[0].conv1_attention, Conv1)


def test_kernel_sizes_reach_own_classes_with_a_kernel():
    def sizes(**options):
        model = ecanet.create_model("resnet18", **options)
        return [m.kernel_size for m in model.modules() if isinstance(m, ecanet.ECA)][::2]

    assert sizes(attention=MyECA, kernel_sizes="official") == [3, 5, 7, 7]
    assert sizes(attention=MyECA) == [3, 5, 5, 5]
    # A size that the caller has fixed is not replaced by the rule.
    assert sizes(attention=functools.partial(MyECA, kernel_size=9)) == [9, 9, 9, 9]


@pytest.mark.parametrize(
    ("attention", "name", "key"),
    [
        (ecanet.SE, "se", "se"),
        (functools.partial(ecanet.SE, reduction=4), "se", "se"),
        (MyGate, "MyGate", "my_gate"),
        (build_plain, "build_plain", "build_plain"),
        (lambda channels: Plain(channels), "<lambda>", "own_attention"),
        ("torch.nn.BatchNorm2d", "BatchNorm2d", "batch_norm2d"),
    ],
)
def test_names_and_keys(attention, name, key):
    kind = find_attention(attention)
    assert (kind.name, kind.key) == (name, key)
    assert key in {
        part for k in ecanet.create_model("resnet20", attention=attention).state_dict() for part in k.split(".")
    }


@pytest.mark.parametrize("attention", [Plain, build_plain, lambda channels: Plain(channels, bias=False)])
def test_any_callable_is_allowed_where_outputs_may_change(attention):
    plain = network()
    with pytest.raises(AttachError, match="no ecanet.ChannelAttention that can be made neutral") as caught:
        ecanet.attach(network(), attention)
    assert "\n" not in str(caught.value)
    model = ecanet.attach(copy.deepcopy(plain), attention, preserve=False)
    sites = ecanet.attached(model)
    assert [(s.channels, s.kernel_size) for s in sites][-1] == (512, None)
    assert not torch.equal(model(IMAGE), plain(IMAGE))
    with pytest.warns(UserWarning, match="outputs change"):
        ecanet.detach(model)
    assert torch.equal(model(IMAGE), plain(IMAGE))


def test_own_classes_take_the_place_of_squeeze_excite_modules():
    with pytest.warns(UserWarning, match="9 'se' modules gave way to 'MyGate'"):
        model = ecanet.attach(torchvision.models.mobilenet_v3_small(), MyGate, replace="se")
    assert sum(isinstance(m, MyGate) for m in model.modules()) == 9
    with pytest.warns(UserWarning, match="outputs change"):
        ecanet.detach(model)
    assert not any(isinstance(m, MyGate) for m in model.modules())


def test_a_dotted_path_names_a_class(monkeypatch, tmp_path):
    (tmp_path / "somebodys_gates.py").write_text(
        "import ecanet\n\n\nclass HalfGate(ecanet.SE):\n    pass\n\n\ndef launch(channels):\n    raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ecanet.attach(network(), "somebodys_gates.HalfGate", reduction=8)
    assert ecanet.attached(model)[0].attention == "HalfGate"
    assert model.layer1[0].half_gate.fc1.out_features == 8
    # A checkpoint may hold such a path, so a path never leads to the call of a function.
    with pytest.raises(ConfigError, match="'somebodys_gates.launch' is not a class of torch.nn.Module"):
        ecanet.create_model("resnet18", attention="somebodys_gates.launch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ecanet.create_model("resnet18", attention=3), "callable from a channel count to a module, got 3"),
        (lambda: ecanet.attach(network(), 3), "callable from a channel count to a module, got 3"),
        (lambda: ecanet.attach(network(), None), "callable from a channel count to a module, got None"),
        (lambda: ecanet.create_model("resnet18", attention=int), "got <class 'int'>"),
        (lambda: ecanet.create_model("resnet18", attention=MyGate(4)), "pass the class MyGate, not an instance"),
        (lambda: ecanet.create_model("resnet18", attention=lambda: 1), "takes no channel count"),
        (lambda: ecanet.create_model("resnet18", attention=lambda c: 1), "must return a torch.nn.Module, got int"),
        (lambda: ecanet.create_model("resnet18", attention=MyGate, slop=1), "no option 'slop'; did you mean 'slope'?"),
        (lambda: ecanet.attach(network(), MyGate, reduction=1), "'MyGate' has no option 'reduction'; it takes slope"),
        (lambda: ecanet.create_model("resnet18", attention=MyGate, kernel_sizes=3), "has no kernel"),
        (lambda: ecanet.create_model("resnet18", attention=nn.Linear), "needs the option 'out_features'"),
        (lambda: ecanet.create_model("resnet18", atention="se"), "did you mean 'attention'?"),
        (lambda: ecanet.create_model("resnet18", num_class=3), "did you mean 'num_classes'?"),
        (lambda: ecanet.attach(network(), exampel=IMAGE), "did you mean 'example'?"),
        (lambda: ecanet.attach(network(), "no_such_package.Gate"), "cannot import attention 'no_such_package.Gate'"),
        (lambda: ecanet.attach(network(), "torch.nn.NoGate"), "'torch.nn.NoGate' is not a class"),
        (lambda: ecanet.attach(network(), GateWithoutLast), "GateWithoutLast defines no last_parameters()"),
        (lambda: ecanet.attach(network(), WrongLast), "'WrongLast' changes its input after neutralize()"),
        (
            lambda: ecanet.attach(network(), lambda c: nn.AvgPool2d(2), preserve=False),
            "must keep the shape (2, 64, 16,",
        ),
        (lambda: ecanet.attach(network(), lambda c: nn.Conv2d(5, c, 1), preserve=False), "does not run on shape"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises((AttachError, ConfigError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_detectors_and_checkpoints_take_own_classes(tmp_path):
    with torch.device("meta"):
        from ecanet.models import create_detector

        detector = create_detector("retinanet", "resnet18", attention=MyGate, slope=3.0)
    assert sum(isinstance(m, MyGate) for m in detector.modules()) == 8
    plain = ecanet.create_model("resnet20", attention="none").eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    for attention, neutral in ((MyGate, 9), (GateWithoutLast, 0), (Plain, 0)):
        model = ecanet.create_model("resnet20", attention=attention, weights=tmp_path / "plain.pt").eval()
        assert (len(model.load_report.neutral), len(model.load_report.acting)) == (neutral, 9 - neutral)
        assert torch.equal(model(IMAGE), plain(IMAGE)) == (neutral == 9)
