"""Networks: the paper's parameter counts, torchvision's outputs, and the gate where the paper puts it."""

import copy

import pytest
import torch
import torchvision

import ecanet
from ecanet import create_model, ops
from ecanet.errors import CheckpointError, ConfigError
from published_networks import GATES, randomize, recompute

PLAIN = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "mobilenet_v2": 3_504_872,
}
"""Parameters of torchvision's networks (its documentation); / 2^20 they are the paper's column."""


NETWORKS = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("resnet101", "resnet152"))) for name in PLAIN]
"""The names; the two deepest networks have the blocks of resnet50, only more of them."""


def parameters(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in ecanet.create_model(name, **options).parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(name):
    assert parameters(name, attention="none") == PLAIN[name]
    added = tuple(parameters(name, kernel_sizes=k) - PLAIN[name] for k in ("official", "adaptive", 3))
    assert added == GATES[name]


@pytest.mark.parametrize(
    ("name", "reduction", "millions"),
    [("resnet18", 16, "11.231"), ("resnet34", 16, "20.938"), ("resnet50", 16, "26.77"), ("mobilenet_v2", 8, "3.40"),
     pytest.param("resnet101", 16, "47.01", marks=pytest.mark.slow),
     pytest.param("resnet152", 16, "63.68", marks=pytest.mark.slow)],
)  # fmt: skip
def test_se_networks_have_the_papers_counts(name, reduction, millions):
    count = parameters(name, attention="se", reduction=reduction)
    assert f"{count / 2**20:.{len(millions.split('.')[1])}f}" == millions


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_networks_are_torchvisions(name):
    ours = ecanet.create_model(name, attention="none", num_classes=7).eval()
    theirs = randomize(torchvision.models.get_model(name, num_classes=7))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_what_their_tensors_say(name):
    model = randomize(ecanet.create_model(name, num_classes=5)).double()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = recompute(name, model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        ungated = ecanet.create_model(name, attention="none", num_classes=5).double().eval()
        ungated.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(ungated(x), expected, rtol=1e-2)  # the gates do matter


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=[pytest.mark.slow] * (name != "resnet8" and not quick))
        for attention in ("none", "eca", "eca-ns", "se", "se-var1", "se-var2", "se-var3", "se-gc")
        for quick in [attention in ("none", "eca", "se-gc")]
        for name in ("resnet8", "mobilenet_v2", "resnet18")
    ],
)
def test_every_attention_in_every_kind_of_network(name, attention):
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"groups": 4} if attention == "se-gc" else {}
    model = ecanet.create_model(name, attention=attention, num_classes=3, in_channels=1, **options)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_small_image_networks():
    for name, blocks in (("resnet20", 9), ("resnet56", 27)):
        model = ecanet.create_model(name, num_classes=10, in_channels=1)
        gates = [m for m in model.modules() if isinstance(m, ecanet.ECA)]
        assert len(gates) == blocks
        assert {g.channels for g in gates} == {16, 32, 64}
        for size in (8, 28, 64):
            assert model(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_kernel_sizes_reach_the_stages():
    def kernels(**options):
        model = ecanet.create_model("resnet18", **options)
        return [model.get_submodule(f"layer{s}.{b}.eca").kernel_size for s in (1, 2, 3, 4) for b in (0, 1)]

    assert kernels(kernel_sizes="official") == [3, 3, 5, 5, 7, 7, 7, 7]
    assert kernels() == kernels(kernel_sizes="adaptive") == [3, 3, 5, 5, 5, 5, 5, 5]
    assert kernels(kernel_sizes="adaptive", gamma=1) == [7, 7, 9, 9, 9, 9, 11, 11]
    assert kernels(kernel_sizes=(1, 3, 5, 9)) == [1, 1, 3, 3, 5, 5, 9, 9]
    assert kernels(kernel_sizes=9) == [9] * 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "resnet51"}, "unknown model 'resnet51'; choose one of resnet18"),
        ({"attention": "eca2"}, "unknown attention 'eca2'"),
        ({"kernel_sizes": (3, 5)}, "one integer per stage (4), got 2"),
        ({"kernel_sizes": "3557"}, "'official', 'adaptive' or integers, got '3557'"),
        ({"kernel_sizes": (3, 4, 5, 7)}, "must be odd, got 4"),
        ({"kernel_sizes": 5, "attention": "se"}, "attention 'se' has no kernel"),
        ({"kernel_size": 5}, "give kernel_sizes="),
        ({"features_onyl": True}, "there is no argument 'features_onyl'; did you mean 'features_only'?"),
        ({"reduction": 5}, "has no option 'reduction'"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"in_channels": -1}, "in_channels must be a positive integer, got -1"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ConfigError) as error:
        ecanet.create_model(**{"name": "resnet18", **options})
    assert says in str(error.value)


@pytest.fixture
def torchvision_file(tmp_path, monkeypatch):
    """A synthetic file where torchvision keeps ResNet-18's weights, as a user's machine has after one download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = randomize(torchvision.models.resnet18())
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / url.rsplit("/", 1)[1])
    return theirs


@pytest.mark.parametrize("attention", ["none", "eca", "se"])
def test_torchvision_weights_give_torchvisions_outputs(torchvision_file, attention):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = ecanet.create_model("resnet18", attention=attention, weights="torchvision").eval()
    with torch.no_grad():
        assert torch.equal(model(x), torchvision_file(x))
    small = ecanet.create_model("resnet18", attention=attention, weights="torchvision", num_classes=4)
    assert torch.equal(small.layer4[1].conv2.weight, torchvision_file.layer4[1].conv2.weight)
    assert small.fc.weight.shape == (4, 512)


def test_weights_that_cannot_be_had_are_an_error(torchvision_file, monkeypatch):
    with pytest.raises(CheckpointError, match="torchvision has no weights for 'resnet20'"):
        ecanet.create_model("resnet20", weights="torchvision")
    with pytest.raises(CheckpointError, match="of another shape, first 'conv1.weight'"):
        ecanet.create_model("resnet18", weights="torchvision", in_channels=1)

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(CheckpointError, match=r"cannot get torchvision's weights for 'resnet34' .*as weights="):
        ecanet.create_model("resnet34", weights="torchvision")


def stage_gradients(stage, x):
    """What a training step of ``stage`` gives: output, and the gradients of ``x`` and of every parameter."""
    x = x.clone().requires_grad_()
    y = stage(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *stage.parameters()])]


@pytest.mark.parametrize("name", ["resnet50", "resnet34"])
@pytest.mark.parametrize("attention", ["eca", "none", "cbam"])
def test_gradients_between_blocks_meet_inside_the_tail(name, attention, monkeypatch):
    """As where kernels run; here the lean passes compute them."""
    monkeypatch.setattr(ops, "uses_kernels", lambda x: True)
    stage = create_model(name, attention=attention).layer2.double()
    calls = []
    plain = copy.deepcopy(stage)
    for block in plain:
        block.register_forward_hook(lambda *_: calls.append(1))  # every block is called as a module
    channels = 256 if name == "resnet50" else 64
    x = torch.randn(2, channels, 10, 10, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for a, b in zip(stage_gradients(stage, x), stage_gradients(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert calls
    if attention == "eca":
        assert folds(stage, x, monkeypatch) == len(stage) - 1
        assert folds(plain, x, monkeypatch) == 0


def folds(stage, x, monkeypatch):
    """How many of the stage's tails add two gradients inside their backward."""
    given = []
    with monkeypatch.context() as patch:
        original = ops.lean.reduce
        patch.setattr(ops.lean, "reduce", lambda dy, more, *rest: given.append(more) or original(dy, more, *rest))
        stage_gradients(stage, x)
    return sum(more is not None for more in given)


def test_a_listener_sees_the_whole_gradient():
    model = create_model("resnet18", attention="eca", num_classes=3)
    seen = []
    model.layer2[0].register_forward_hook(lambda module, args, y: seen.append(y))
    x = torch.randn(2, 3, 64, 64)
    loss = model(x).square().sum()
    (found,) = torch.autograd.grad(loss, seen[0])
    model.zero_grad()
    y = seen[0].detach().requires_grad_()
    rest = model.fc(model.avgpool(model.layer4(model.layer3(model.layer2[1](y)))).flatten(1))
    (expected,) = torch.autograd.grad(rest.square().sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
