"""Class-activation maps of `ecanet inspect --cam`: a network with its gates beside the same network without them."""

import itertools
import json
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, resnet18

import ecanet
from ecanet.data import DataSpec
from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig
from ecanet.studies.gates import cams, drawings, inspection, pages

IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


def stir(model):
    """Return ``model`` in evaluation, its gates far from neutral."""
    generator = torch.Generator().manual_seed(0)
    for module in model.eval().modules():
        if isinstance(module, ecanet.attention.Attention):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0, 3, generator=generator)
    return model


def make_attached(attention="eca"):
    torch.manual_seed(0)
    return stir(ecanet.attach(resnet18(num_classes=5).eval(), attention, preserve=False))


def make_ours(attention):
    torch.manual_seed(0)
    return stir(ecanet.create_model("resnet20", attention=attention, num_classes=5))


def draw_by_definition(model, layer, image, label):
    """Return the map of Grad-CAM's definition (Eq. 1, 2), enlarged and scaled to 0 to 1."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: kept.append(out))
    score = model(image[None].clone().requires_grad_())[0, label]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept)
    heat = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu().detach()
    heat = F.interpolate(heat, size=image.shape[1:], mode="bilinear")[0, 0]
    return (heat - heat.min()) / (heat.max() - heat.min())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ecanet.create_model("resnet20"), "layer3"),
        (lambda: ecanet.create_model("resnet18", attention="simam"), "layer4"),
        (lambda: mobilenet_v2(num_classes=5), "features"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), nn.Flatten()), "1"),
    ],
)
def test_the_last_stage_with_spatial_extent_is_chosen(make, expected):
    model = make().eval()
    assert cams.find_layer(model, (3, 64, 64)) == expected
    assert not any(module._forward_hooks for module in model.modules())


class Pieces(nn.Module):
    """A network whose last activations cannot be taken: channels last, one that runs twice, a tuple, one pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity()
        self.pair, self.pool = nn.Identity(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)))
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.pool(self.pair((x, x))[0]).flatten(1)


def test_layers_that_do_not_fit_are_passed_over():
    assert cams.find_layer(Pieces().eval(), (3, 9, 9)) == "first"


def test_a_network_without_such_a_layer_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval()
    with pytest.raises(ConfigError, match=r"--cam finds no activation .* for images of 8 pixels; leave --cam out"):
        cams.find_layer(model, (3, 8, 8))


@pytest.mark.parametrize("attention", ["eca", "cbam", "gct", "simam"])
def test_gates_that_are_off_multiply_by_their_average(attention):
    """The network without attention, whose branches are multiplied by the least squares, gives the same outputs."""
    model = make_ours(attention).double()
    plain = ecanet.create_model("resnet20", attention="none", num_classes=5).eval().double()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    images = torch.stack([IMAGE, IMAGE.flip(0) - 1]).double()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, ecanet.attention.Attention):
            module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, (args[0], out)) and None)
    with torch.no_grad():
        before = model(images)
        scales = cams.measure_scales(model, list(images))
        for name, (x, y) in seen.items():
            factor = torch.linalg.lstsq(x.reshape(-1, 1), y.reshape(-1, 1)).solution.item()
            assert scales[model.get_submodule(name)] == pytest.approx(factor, rel=1e-9)
            branch = plain.get_submodule(f"{name.rpartition('.')[0]}.bn2")
            branch.register_forward_hook(lambda m, args, out, factor=factor: factor * out)
        with cams.switch_gates_off(model, scales):
            torch.testing.assert_close(model(images), plain(images), rtol=1e-9, atol=0)
        assert torch.equal(model(images), before)
        assert not torch.allclose(before, plain(images), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("preserve", "factor"), [(None, 1.0), (False, 0.5)])
def test_constant_gates_are_off_without_a_change(preserve, factor):
    model = ecanet.attach(resnet18(num_classes=5).eval(), preserve=preserve)
    for site in ecanet.attached(model):
        nn.init.zeros_(model.get_submodule(site.name).conv.weight)
    scales = cams.measure_scales(model, [IMAGE])
    assert list(scales.values()) == [factor] * 8
    with torch.no_grad():
        expected = model(IMAGE[None])
        with cams.switch_gates_off(model, scales):
            assert torch.equal(model(IMAGE[None]), expected)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    torch.save(ecanet.create_model("resnet8", in_channels=1, num_classes=10).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"^--cam needs grad-cam: pip install 'ecanet\[cam\]'$"):
        inspect(tmp_path)


def inspect(folder):
    model = ModelConfig(name="resnet8", attention="eca")
    return pages.run(
        folder / "weights.pt", folder / "out", model=model, data_name="digits", classes=["3", "8"], cam=True
    )


@pytest.mark.parametrize("make", [make_attached, lambda: make_ours("eca"), lambda: make_ours("cbam")])
def test_maps_are_those_of_the_definition(make):
    """One of the network as it is, one of the network without gates, both of the class that the former finds."""
    pytest.importorskip("pytorch_grad_cam")
    model = make()
    model.requires_grad_(make is not make_attached)  # a frozen network has maps, too
    image = F.interpolate(IMAGE[None], size=64)[0]
    before, hooks = model(image[None]).detach(), [len(module._forward_hooks) for module in model.modules()]
    layer = cams.prepare_maps(model, (3, 64, 64))
    (pair,) = cams.compare(model, layer, [("a title", image)])
    assert pair.title == "a title"
    assert pair.explained == pair.gated.answer == int(before.argmax())
    assert pair.gated.probability == pytest.approx(float(before.softmax(1).max()), rel=1e-4)
    expected = draw_by_definition(model, layer, image, pair.explained)
    with cams.switch_gates_off(model, cams.measure_scales(model, [image])):
        plain = draw_by_definition(model, layer, image, pair.explained)
        without = model(image[None])[0].detach()
    # grad-cam enlarges by OpenCV, which rounds the positions of pixels to 1/2048.
    torch.testing.assert_close(pair.gated.heat, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(pair.plain.heat, plain, rtol=0, atol=2e-3)
    assert pair.plain.answer == int(without.argmax())
    assert pair.plain.probability == pytest.approx(float(without.softmax(0)[pair.explained]), rel=1e-4)
    assert not torch.allclose(expected, plain, atol=0.05)
    assert torch.equal(model(image[None]), before)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", [r"a$\frac$", "_hidden_$5$", "a long name " * 50])
def test_titles_fit_and_are_no_formulas(name):
    spec = DataSpec(class_names=(name, "other"), channels=1, size=8, mean=(0.5,), std=(0.5,))
    heat = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    on, off = (cams.Map(heat=heat, answer=answer, probability=1.0) for answer in (0, 1))
    pair = cams.Pair(title=f"is {name}", image=torch.zeros(1, 8, 8), explained=0, gated=on, plain=off)
    figure = drawings.draw_cams([pair, pair], spec).to_figure()
    figure.draw_without_rendering()
    shown = spec.class_names[0] if len(name) < 25 else f"{name[:23]}…"
    titles = [axes.title for axes in figure.axes]
    assert [title.get_text() for title in titles[1:3]] == [
        f"gates off: other\n{shown!r} 100.0%",
        f"gates on: {shown}\n{shown!r} 100.0%",
    ]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert min(box.x0 for box in boxes) >= figure.bbox.x0
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


@pytest.fixture
def quick_figures(monkeypatch):
    """Leave the other figures of the page empty, which take seconds."""
    for name in ("draw_classes", "draw_spread", "draw_kernels"):
        monkeypatch.setattr(pages, name, lambda *_: drawings.Drawing(panels=[lambda axes: None]))


@pytest.mark.usefixtures("quick_figures")
def test_the_page_shows_both_maps_and_says_what_is_compared(tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    network = stir(ecanet.create_model("resnet8", in_channels=1, num_classes=10))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    found = inspect(tmp_path)
    assert [pair.title for pair in found.maps] == ["is 3", "is 8"]
    out = tmp_path / "out"
    assert (out / "cams.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "inspect.html").read_text()
    assert "Class-activation maps at layer3" in page
    assert "Both maps have the same weights" in page
    content = json.loads((out / "inspect.json").read_text())["cams"]
    assert content["layer"] == "layer3"
    names = found.task.spec.class_names
    for row, pair in zip(content["images"], found.maps, strict=True):
        assert row["explained"] == row["gates_on"]["answer"] == names[pair.explained]
        assert row["gates_off"]["probability_of_explained"] == pair.plain.probability
    data = inspection.build_data(found.task.recipe, train=False)
    x, labels = next(inspection._iterate_batches(data, {}))
    for pair, label in zip(found.maps, (3, 8), strict=True):
        assert torch.equal(pair.image, x[labels == label][0])  # the first of its class


@pytest.mark.usefixtures("quick_figures")
def test_maps_of_an_earlier_inspection_are_not_kept(tmp_path):
    """A page without maps has no picture of maps beside it; in other folders the file is somebody else's."""
    torch.save(ecanet.create_model("resnet8", in_channels=1, num_classes=10).state_dict(), tmp_path / "weights.pt")
    model = ModelConfig(name="resnet8", attention="eca")
    for mine in (False, True):
        (tmp_path / f"{mine}").mkdir()
        (tmp_path / f"{mine}" / "cams.png").touch()
        if mine:
            (tmp_path / f"{mine}" / "inspect.json").touch()
        found = pages.run(tmp_path / "weights.pt", tmp_path / f"{mine}", model=model, data_name="digits")
        assert found.maps == []
        assert (tmp_path / f"{mine}" / "cams.png").exists() != mine
