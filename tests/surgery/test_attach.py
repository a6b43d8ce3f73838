"""Attach, detach, fold: bit for bit, at the papers' places, under the papers' keys."""

import copy
import random
import warnings

import numpy
import pytest
import torch
from torch import nn
from torchvision import models

import ecanet
import sweep_checks as sweep
from ecanet.errors import AttachError, ConfigError
from source_files import ROOT
from tensors import noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def network(name="resnet18", dtype=torch.float32):
    torch.manual_seed(0)
    model = models.get_model(name)
    sweep.randomize(model)
    return model.to(dtype).eval()


def image(dtype=torch.float32, size=40):
    return noise(2, 3, size, size).to(dtype)


def trained(model):
    sweep.excite([model.get_submodule(site.name) for site in ecanet.attached(model)])
    return model


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    [
        pytest.param(name, dtype, training, marks=[pytest.mark.slow] * (low and (training or name != "resnet18")))
        for name in ("resnet18", "mobilenet_v2")
        for dtype in DTYPES
        for training in (False, True)
        for low in [dtype != (torch.float32 if name == "resnet18" else torch.bfloat16)]
    ],
    ids=str,
)
def test_outputs_stay_bit_for_bit(name, dtype, training):
    plain = network(name, dtype).train(training)
    model = ecanet.attach(copy.deepcopy(plain))
    assert next(model.get_submodule(ecanet.attached(model)[0].name).parameters()).dtype == dtype
    torch.manual_seed(1)
    before = plain(image(dtype))
    torch.manual_seed(1)
    assert torch.equal(model(image(dtype)), before)


@pytest.mark.parametrize("attention", ["eca", "eca-ns", "se", "se-var2", "se-var3", "se-gc", "cbam", "gc"])
def test_every_attention_is_lossless(attention):
    plain = network()
    model = ecanet.attach(copy.deepcopy(plain), attention)
    assert len(ecanet.attached(model)) == 8
    assert torch.equal(model(image()), plain(image()))


def test_channels_last_outputs_and_gradients():
    for name in ("resnet18", "mobilenet_v2"):
        plain = network(name).to(memory_format=torch.channels_last)
        model = ecanet.attach(copy.deepcopy(plain))
        x = image().contiguous(memory_format=torch.channels_last)
        expected, result = sweep.gradients(plain, (x,))
        actual, attached = sweep.gradients(model, (x,))
        assert torch.equal(result, attached)
        assert all(torch.equal(actual[key], gradient) for key, gradient in expected.items())


@pytest.mark.parametrize(
    ("name", "count", "first", "after"),
    [
        ("resnet18", 8, "layer1.0.eca", "layer1.0.bn2"),
        ("resnet50", 16, "layer1.0.eca", "layer1.0.bn3"),
        ("mobilenet_v2", 17, "features.1.conv.3", "features.1.conv.2"),
        ("mobilenet_v3_small", 11, "features.1.eca", "features.1.block"),
        ("efficientnet_b0", 16, "features.1.0.eca", "features.1.0.block"),
        ("convnext_tiny", 18, "features.1.0.eca", "features.1.0.block"),
        ("vgg11_bn", 5, "features.2.eca", "features.2"),
        ("densenet121", 5, "features.relu0.eca", "features.relu0"),
    ],
)
def test_gates_stand_at_the_end_of_branches_and_stages(name, count, first, after):
    sites = ecanet.attached(ecanet.attach(models.get_model(name)))
    assert (len(sites), sites[0].name, sites[0].after) == (count, first, after)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("resnetv2_18", "stages.0.blocks.0.conv2"),
        ("nf_resnet26", "stages.0.0.conv3"),
        ("convnext_atto", "stages.0.blocks.0.mlp"),
        ("res2net50_14w_8s", "layer1.0.bn3"),
        ("repvgg_a0", "stem"),
        ("mobilenetv2_100", "blocks.0.0.bn2"),
    ],
)
def test_gates_stand_at_the_end_of_branches_in_timm(name, after):
    timm = pytest.importorskip("timm")
    sites = ecanet.attached(ecanet.attach(timm.create_model(name)))
    assert sites[0].after == after
    inner = [s for s in sites if ".bns." in s.after or ".rbr" in s.after or "conv_kxk" in s.after]
    assert not inner, "an inner sum is no residual branch"
    if name == "mobilenetv2_100":
        assert len(sites) == 17


def test_hrnet_sums_between_resolutions_get_no_gate():
    timm = pytest.importorskip("timm")
    sites = ecanet.attached(ecanet.attach(timm.create_model("hrnet_w18_small")))
    assert sites
    assert not [s for s in sites if "fuse" in s.after or "transition" in s.after]


class ChannelsEnd(nn.Module):
    """A branch whose tensors are N H W C."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x):
        y = self.linear(self.depthwise(x).permute(0, 2, 3, 1).relu())
        return x + (self.scale * y).permute(0, 3, 1, 2)


def test_channel_axis_is_found():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), ChannelsEnd())
    x = torch.rand(2, 3, 5, 9)
    before = model(x)
    ecanet.attach(model)
    (site,) = ecanet.attached(model)
    assert (site.after, site.channels) == ("1.linear", 6)  # before the layer scale
    assert torch.equal(model(x), before)
    sweep.excite([model[1].eca])
    y = model[1].depthwise(model[0](x)).permute(0, 2, 3, 1).relu()
    y = model[1].eca(nn.functional.linear(y, model[1].linear.weight, model[1].linear.bias).permute(0, 3, 1, 2))
    assert torch.allclose(model(x), model[0](x) + y * 0.5, atol=1e-6)


class ChannelsLastImages(nn.Module):
    """A network that takes images (N, H, W, C), as TensorFlow does, and shuffles channels as ShuffleNet does."""

    def __init__(self):
        super().__init__()
        self.normalize = nn.Identity()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.shuffle = Shuffle()

    def forward(self, x):
        x = self.stem(self.normalize(x).permute(0, 3, 1, 2))
        return x + self.shuffle(self.branch(x))


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, *size = x.shape
        return x.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)


def test_channels_are_axis_1_where_nothing_else_is_known():
    x = torch.rand(2, 6, 10, 4)
    model = ChannelsLastImages()
    before = model(x)
    ecanet.attach(model, example=x)
    (site,) = ecanet.attached(model)
    # A convolution puts channels on axis 1, whatever axis they had before; so does the end of the shuffle.
    assert (site.after, site.channels) == ("shuffle", 8)
    assert torch.equal(model(x), before)
    # The channels of the model's own input are taken for axis 1.
    first = ecanet.attach(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1)), where="0", example=torch.rand(2, 3, 6, 10))
    assert ecanet.attached(first)[0].channels == 3


@pytest.mark.parametrize(
    ("name", "preserve", "sizes"),
    [
        ("resnet18", False, {}),
        ("mobilenet_v2", True, {"kernel_sizes": "official"}),
        *(
            pytest.param(name, preserve, {"kernel_sizes": "official"} if official else {}, marks=pytest.mark.slow)
            for name in ("resnet18", "resnet50", "mobilenet_v2")
            for preserve in (True, False)
            for official in (True, False)
            if (name, preserve, official) not in (("resnet18", False, False), ("mobilenet_v2", True, True))
        ),
    ],
)
def test_attached_and_created_networks_load_into_each_other(name, preserve, sizes):
    created = ecanet.create_model(name, **sizes)
    attached = ecanet.attach(models.get_model(name), preserve=preserve, **sizes)
    if not preserve:  # the paper's form has no gain, so the two agree in every key before anything is loaded
        assert set(created.state_dict()) == set(attached.state_dict())
    sweep.randomize(attached)
    trained(attached)
    created.load_state_dict(attached.state_dict())
    assert_same_outputs(created, attached)
    sweep.randomize(created)
    attached.load_state_dict(created.state_dict())
    assert_same_outputs(created, attached)
    fresh = ecanet.create_model(name, **sizes)  # the paper's form, with gain 1
    sweep.randomize(fresh)
    attached.load_state_dict(fresh.state_dict())
    assert_same_outputs(fresh, attached)


def assert_same_outputs(a, b):
    """Compare in float64, up to the rounding of some hundred layers: one runs the fused tail, the other does not."""
    x = image(torch.float64)
    a, b = (copy.deepcopy(model).double().eval()(x) for model in (a, b))
    assert (a - b).abs().max() <= 1e4 * torch.finfo(torch.float64).eps * b.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        *(pytest.param(f"resnet{n}", marks=pytest.mark.slow) for n in (34, 101, 152)),
    ],
)
def test_official_kernel_sizes_are_those_of_create_model(name):
    created = ecanet.create_model(name, kernel_sizes="official")
    ours = [m.kernel_size for m in created.modules() if isinstance(m, ecanet.ECA)]
    model = ecanet.attach(models.get_model(name), kernel_sizes="official")
    assert [site.kernel_size for site in ecanet.attached(model)] == ours


def test_kernel_sizes_per_stage():
    sites = ecanet.attached(ecanet.attach(models.resnet18(), kernel_sizes=(1, 3, 5, 7)))
    assert [site.kernel_size for site in sites] == [1, 1, 3, 3, 5, 5, 7, 7]
    with pytest.raises(ConfigError, match="one integer per stage \\(4\\), got 3"):
        ecanet.attach(models.resnet18(), kernel_sizes=(3, 5, 7))
    with pytest.raises(ConfigError, match="no kernel"):
        ecanet.attach(models.resnet18(), "se", kernel_sizes=3)


def test_old_plain_checkpoint_gives_old_outputs_and_misses_exactly_the_gates():
    plain = network()
    model = ecanet.attach(models.resnet18())
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == {f"{site.name}.conv.weight" for site in ecanet.attached(model)}
    assert result.unexpected_keys == []
    assert torch.equal(model.eval()(image()), plain(image()))


def test_load_checkpoint_makes_gates_absent_from_the_file_neutral(tmp_path):
    plain = network()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model = trained(ecanet.attach(models.resnet18()))
    report = ecanet.load_checkpoint(model, tmp_path / "plain.pt")
    assert len(report.neutral) == 8
    assert torch.equal(model.eval()(image()), plain(image()))


def draw_from_numpy():
    return numpy.random.rand()  # noqa: NPY002 (NumPy's global state is what a model may draw from)


def test_the_run_on_an_example_leaves_no_trace():
    class Noisy(nn.Module):
        def forward(self, x):
            self.count += 1
            return x + torch.rand(()) + random.random() + draw_from_numpy()

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    model = nn.Sequential(network().train(), Noisy())
    model[0].layer2.eval()
    flags = [(m, m.training) for m in model.modules()]
    buffers = {k: b.clone() for k, b in model.named_buffers()}

    def seed():
        for function in (torch.manual_seed, random.seed, numpy.random.seed):
            function(3)

    seed()
    expected = torch.rand(()), random.random(), draw_from_numpy()
    seed()
    ecanet.attach(model, "se-var1", preserve=False)  # it draws no numbers of its own
    assert (torch.rand(()), random.random(), draw_from_numpy()) == expected
    assert all(m.training == training for m, training in flags)
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers() if k in buffers)
    assert all(p.grad is None for p in model.parameters())


def test_detach_gives_the_model_back():
    plain = network()
    model = ecanet.attach(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neutral gates go silently
        ecanet.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(model(image()), plain(image()))
    with pytest.raises(AttachError, match="no attention is attached"):
        ecanet.detach(model)


def test_detach_of_a_trained_model_keeps_the_rest_and_warns():
    model = ecanet.attach(network())
    with torch.no_grad():
        model.layer2[0].eca.conv.weight[..., 1] = 1.0
    largest = max(abs(2 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).sigmoid() - 1).flatten())
    others = {k: v.clone() for k, v in model.state_dict().items() if ".eca." not in k}
    with pytest.warns(UserWarning, match=r"8 gates.*largest \|gate - 1\| was 0\.9") as caught:
        ecanet.detach(model)
    assert len(caught) == 1
    assert largest > 0.9
    assert set(model.state_dict()) == set(others)
    assert all(torch.equal(v, others[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attention", ["eca", "eca-ns", "se", "se-var2", "se-var3", "se-gc", "cbam"])
def test_fold_is_exact_and_gives_the_papers_module(attention):
    model = trained(ecanet.attach(network(), attention))
    before = model(image())
    ecanet.fold(model)
    assert torch.equal(model(image()), before)
    assert not [key for key in model.state_dict() if key.endswith("gain")]


@pytest.mark.parametrize(("attention", "factor"), [("eca", 2), ("cbam", 4)])
def test_detach_after_fold_halves_what_was_doubled(attention, factor):
    plain = network()
    model = ecanet.fold(ecanet.attach(copy.deepcopy(plain), attention))
    assert torch.equal(model.layer1[0].bn2.weight, factor * plain.layer1[0].bn2.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a neutral gate is known as one in its folded form too
        ecanet.detach(model)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def test_fold_refuses_and_names_the_site():
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    model = ecanet.attach(nn.Sequential(convolutions, nn.ReLU()), where="0.2")  # a gate after ReLU
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttachError, match="cannot fold '0.2.eca'"):
        ecanet.fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    shared = models.resnet18()
    shared.layer1[1].bn2.weight = shared.layer1[0].bn2.weight
    with pytest.raises(AttachError, match="shares its weight"):
        ecanet.fold(ecanet.attach(shared))


def test_preserve_false_attaches_the_papers_form():
    with pytest.raises(AttachError, match="SE-Var1"):
        ecanet.attach(models.resnet18(), "se-var1")
    plain = network()
    model = ecanet.attach(copy.deepcopy(plain), preserve=False)
    assert not torch.equal(model(image()), plain(image()))
    assert {site.note for site in ecanet.attached(model)} == {"outputs changed when attached"}
    assert not [key for key in model.state_dict() if key.endswith("gain")]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("layer4.*", ["layer4.0.eca", "layer4.1.eca"]),
        ("layer4", ["layer4.0.eca", "layer4.1.eca"]),
        ("layer4.1.bn2", ["layer4.1.eca"]),
        ("layer1.0.bn1", ["layer1.0.eca"]),
        (lambda name, module: name.startswith("layer3"), ["layer3.0.eca", "layer3.1.eca"]),
        ("**.downsample", ["layer2.0.eca", "layer3.0.eca", "layer4.0.eca"]),
    ],
)
def test_where_selects_the_places(where, names):
    assert [site.name for site in ecanet.attached(ecanet.attach(models.resnet18(), where=where))] == names


def test_where_takes_a_class():
    blocks = ecanet.attach(models.resnet18(), where=models.resnet.BasicBlock)
    assert [s.after for s in ecanet.attached(blocks)][:2] == ["layer1.0.bn2", "layer1.1.bn2"]
    norms = ecanet.attach(models.resnet18(), where=nn.BatchNorm2d)
    assert len(ecanet.attached(norms)) == 20


def test_different_attentions_at_different_sites():
    plain = network()
    model = ecanet.attach(copy.deepcopy(plain), "se", where="layer3", reduction=8)
    ecanet.attach(model, "eca", where="layer4", kernel_size=7)
    assert [(s.name, s.attention) for s in ecanet.attached(model)] == [
        ("layer3.0.se", "se"), ("layer3.1.se", "se"), ("layer4.0.eca", "eca"), ("layer4.1.eca", "eca")
    ]  # fmt: skip
    assert torch.equal(model(image()), plain(image()))
    ecanet.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_mistakes_are_one_line_with_a_remedy():
    for call, message in {
        lambda: ecanet.attach(models.resnet18(), "ecaa"): "unknown attention 'ecaa'",
        lambda: ecanet.attach(models.resnet18(), kernel_size=4): "must be odd",
        lambda: ecanet.attach(models.resnet18(), reduction=4): "no option 'reduction'",
        lambda: ecanet.attach(models.resnet18(), where="layer9"): "selects no module",
        lambda: ecanet.attach(nn.Sequential(nn.Linear(3, 3))): "pass example=",
        lambda: ecanet.attach(models.resnet18(), example=torch.rand(2, 5, 64, 64)): "could not run ResNet",
        lambda: ecanet.attach(ecanet.attach(models.resnet18())): "already has attention 'eca'",
    }.items():
        with pytest.raises((AttachError, ConfigError), match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_failed_attach_leaves_the_model_alone():
    model = models.resnet18()
    with pytest.raises(ConfigError):
        ecanet.attach(model, "se-gc", groups=7)
    assert not [m for m in model.modules() if m._forward_hooks or hasattr(m, "se_gc")]


def test_report_prints_as_a_table():
    text = str(ecanet.attached(ecanet.attach(models.resnet50(), kernel_sizes="official")))
    assert text.splitlines()[0].split() == [
        "name",
        "after",
        "channels",
        "attention",
        "k",
        "parameters",
        "calls",
        "note",
    ]
    assert text.splitlines()[-1].split() == ["total", "16", "sites", "80"]


def test_a_gate_trains_only_in_an_optimizer_made_afterwards():
    model = ecanet.attach(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(image()).square().sum().backward()
    optimizer.step()
    assert all(model.get_submodule(site.name).conv.weight.any() for site in ecanet.attached(model))


def test_the_first_example_of_the_guide_runs():
    page = (ROOT / "docs" / "attach.md").read_text() if (ROOT / "docs").is_dir() else None
    if page is None:
        pytest.skip("the guide is not here")
    exec(page.split("```python\n")[1].split("```")[0], {})


def test_no_gate_stands_before_self_attention():
    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp_norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

        def forward(self, x):
            x = self.stem(x).relu().flatten(2).transpose(1, 2)
            h = self.norm(x)
            x = x + self.attention(h, h, h)[0]
            return x + self.mlp(self.mlp_norm(x))

    assert [site.after for site in ecanet.attached(ecanet.attach(Hybrid(), example=torch.rand(1, 3, 8, 8)))] == [
        "mlp.2"
    ]
