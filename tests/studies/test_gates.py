"""`ecanet inspect`: its records of gates whose behaviour is known beforehand, and its page."""

import html
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ecanet
from ecanet import recipes
from ecanet.attention import CBAM, ECA, ESE, GCT, SRM, Fca, GlobalContext, SEVar2, SimAM
from ecanet.attention import recording as records
from ecanet.errors import ConfigError
from ecanet.report import figures
from ecanet.studies.gates import drawings, pages


def images(n: int, channels: int = 4) -> Tensor:
    return torch.randn(n, channels, 3, 5, generator=torch.Generator().manual_seed(0))


def test_sums_by_class_are_the_plain_averages():
    """Three uneven batches with two of three classes must give the averages over all images at once."""
    model, x = nn.Sequential(SEVar2(4)), images(10)
    labels = torch.tensor([0, 2, 2, 0, 0, 2, 2, 2, 0, 0])
    batches = [(x[:3], labels[:3]), (x[3:4], labels[3:4]), (x[4:], labels[4:])]
    (found,) = records.record_gates(model, batches, classes=3)
    weights = torch.sigmoid(model[0].weight.detach() * x.mean((2, 3)))
    close = torch.testing.assert_close
    close(found.mean, weights.mean(0))
    close(found.deviation, weights.std(0, correction=0))
    close(found.class_means[0], weights[labels == 0].mean(0))
    close(found.class_means[2], weights[labels == 2].mean(0))
    assert found.class_means[1].isnan().all()
    assert found.counts.tolist() == [5, 0, 5]
    close(found.lowest, weights.amin(0))
    close(found.highest, weights.amax(0))
    two = torch.stack([weights[labels == 0].mean(0), weights[labels == 2].mean(0)])
    assert found.spread == pytest.approx(float(two.std(0, correction=0).mean()), rel=1e-5)


def gate_with(logits: list[float]) -> nn.Sequential:
    """Return a network of one gate whose weights are sigmoid(logits) for an input of ones."""
    model = nn.Sequential(SEVar2(4))
    model[0].weight.data = torch.tensor(logits, dtype=torch.float32)
    return model


def test_alarms_name_dead_saturated_and_constant_gates():
    ones, labels = torch.ones(6, 4, 2, 2), torch.zeros(6, dtype=torch.long)
    (healthy,) = records.record_gates(gate_with([0.5, -1, 1, 2]), [(images(6), labels)], 1)
    assert healthy.find_alarms() == []
    (dead,) = records.record_gates(gate_with([-9, 1, -9, 1]), [(ones * torch.rand(6, 1, 1, 1).add(0.9), labels)], 1)
    assert dead.dead.tolist() == [True, False, True, False]
    assert dead.saturated == 0.5
    assert "2 of 4 channels are shut on every image" in dead.find_alarms()
    assert any(alarm.startswith("50% of the weights") for alarm in dead.find_alarms())
    (constant,) = records.record_gates(gate_with([1, 2, -1, -2]), [(ones, labels)], 1)
    assert constant.find_alarms() == ["the weights are the same for every image: a constant could replace this gate"]
    (wide_open,) = records.record_gates(gate_with([9, 9, 9, 0]), [(ones, labels)], 1)
    assert wide_open.saturated == 0.75
    assert not wide_open.dead.any()


def plant(gate, kind):
    """Make of a lossless SE or eSE one that shows ``kind``."""
    layers = [gate.fc] if isinstance(gate, ESE) else [gate.fc1, gate.fc2]
    generator = torch.Generator().manual_seed(0)
    for layer in layers if kind == "healthy" else ():
        nn.init.normal_(layer.weight, 0, 0.2, generator=generator)
    bias = {"dead": -9.0, "saturated": 9.0, "constant": 0.5, "broken": torch.nan}.get(kind, 0.0)
    layers[-1].bias.data.fill_(bias)


@pytest.mark.parametrize(("attention", "options"), [("se", {"reduction": 2, "bias": True}), ("ese", {})])
def test_planted_faults_in_an_attached_network_are_named(attention, options):
    """One gate of each kind; no other gate is accused."""
    constant = "the weights are the same for every image: a constant could replace this gate"
    ends = "100% of the weights are at an end of their range, where gradients vanish"
    planted = {
        "unmoved": ["every weight is still within 0.02 of 1: the gate began as the identity and has not moved; "],
        "healthy": [],
        "dead": [ends, "16 of 16 channels are shut on every image", constant],
        "saturated": [ends, constant],
        "constant": [constant],
        "broken": ["the weights of 32 of 32 channels are NaN"],
    }
    torch.manual_seed(0)
    model = ecanet.create_model("resnet20", attention="none")
    sites = ecanet.attached(ecanet.attach(model.eval(), attention, where="layer*.*", **options))
    placed = dict(zip(("unmoved", "healthy", "dead"), sites, strict=False))
    placed |= dict(zip(("saturated", "constant", "broken"), sites[3:], strict=False))
    for kind, site in placed.items():
        plant(model.get_submodule(site.name), kind)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {one.name: one for one in records.record_gates(model, [(x, torch.zeros(6, dtype=torch.long))], 1)}
    for kind, site in placed.items():
        alarms = found[site.name].find_alarms()
        assert len(alarms) == len(planted[kind]), (kind, alarms)
        for alarm, begin in zip(alarms, planted[kind], strict=True):
            assert alarm.startswith(begin), kind


def test_one_image_does_not_make_a_constant():
    for n, expected in ((1, 0), (2, 1)):
        x, labels = torch.ones(n, 4, 2, 2), torch.zeros(n, dtype=torch.long)
        (found,) = records.record_gates(gate_with([1, 2, -1, -2]), [(x, labels)], 1)
        assert len(found.find_alarms()) == expected


def test_a_gct_has_twice_the_range():
    """Its weights are 1 + tanh: 1 is the middle of its range, and 1.99 an end."""
    model = nn.Sequential(GCT(4))
    model[0].beta.data = torch.tensor([0.0, 0.0, 9.0, -9.0])
    (found,) = records.record_gates(model, [(images(5), torch.zeros(5, dtype=torch.long))], 1)
    assert (found.gain, found.ceiling) == (1, 2)
    torch.testing.assert_close(found.mean, torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert found.saturated == 0.5
    assert found.dead.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("attention", "options"), [("eca", {}), ("se", {"reduction": 2}), ("se-var3", {}), ("cbam", {"reduction": 2})]
)
def test_lossless_gates_that_have_not_moved_are_named(attention, options):
    """A lossless gate is named until one weight on one image has left 1; a gate of the paper's form never is."""
    gate = ecanet.make_attention(attention, 32, **options)
    gate.neutralize()
    x, labels = images(6, 32), torch.zeros(6, dtype=torch.long)
    (found,) = records.record_gates(nn.Sequential(gate), [(x, labels)], 1)
    (alarm,) = found.find_alarms()
    assert alarm.startswith("every weight is still within 0.02 of 1")
    assert "ecanet.parameter_groups" in alarm
    for parameter in gate.last_parameters():
        parameter.data.fill_(1)
    (moved,) = records.record_gates(nn.Sequential(gate), [(x, labels)], 1)
    assert not any("has not moved" in alarm for alarm in moved.find_alarms())
    (paper,) = records.record_gates(gate_with([0, 0, 0, 0]), [(images(6), labels)], 1)
    assert paper.find_alarms() == ["the weights are the same for every image: a constant could replace this gate"]


@pytest.mark.parametrize(("logits", "unmoved"), [((0.03, -0.03), True), ((0.05, 0), False), ((0, -0.05), False)])
def test_one_weight_away_from_one_is_a_move(logits, unmoved):
    model = gate_with([0, *logits, 0])
    model[0].gain = 2.0
    (found,) = records.record_gates(model, [(torch.ones(3, 4, 2, 2), torch.zeros(3, dtype=torch.long))], 1)
    assert found.is_unmoved == unmoved


def test_a_gain_of_two_doubles_the_range():
    model = gate_with([0, 0, 0, 0])
    model[0].gain = 2.0
    (found,) = records.record_gates(model, [(torch.ones(2, 4, 2, 2), torch.zeros(2, dtype=torch.long))], 1)
    assert found.mean.tolist() == [1, 1, 1, 1]
    assert found.saturated == 0  # 1 is the middle of the range, not an end


def stirred(gate: nn.Module) -> nn.Module:
    """Return ``gate`` in evaluation, with random parameters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, generator=generator)
    return gate.eval()


STATISTICS = [stirred(make(8)) for make in (ESE, GCT, SRM, Fca)]


@pytest.mark.parametrize("gate", [ECA(8), CBAM(8, reduction=2), *STATISTICS], ids=lambda gate: type(gate).__name__)
def test_weights_are_what_the_gate_multiplies_by(gate):
    x = images(3, 8)
    weights = records.compute_image_weights(nn.Sequential(gate), x)["0"]
    y = gate(x)
    if isinstance(gate, CBAM):
        gate.spatial.weight.data.zero_()  # the spatial gate is then 0.5 everywhere
        y = 2 * gate(x)
    torch.testing.assert_close(y, x * weights[:, :, None, None])


@pytest.mark.parametrize("make", [ECA, ESE, GCT, SRM, Fca])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_gate_can_be_held_at_its_mean(make, gain):
    """A held gate gives every image the same weights; afterwards the module is as it was before."""
    model, x = nn.Sequential(stirred(make(4))), images(6)
    model[0].gain = gain
    labels = torch.zeros(6, dtype=torch.long)
    before = model(x)
    found = records.record_gates(model, [(x, labels)], 1)
    held = records.run_with_held_gates(model, x[:2], found)["0"]
    torch.testing.assert_close(held, x[:2] * found[0].mean[:, None, None])
    assert torch.equal(model(x), before)
    assert not torch.allclose(held, before[:2])


def test_a_network_without_gates_is_refused():
    with pytest.raises(ConfigError, match="no channel gates"):
        records.record_gates(ecanet.create_model("resnet8", attention="none"), [], 10)
    with pytest.raises(ConfigError, match="no channel gates to inspect: CoordinateAttention does not give"):
        records.record_gates(ecanet.create_model("resnet8", attention="coord"), [], 10)
    with pytest.raises(ConfigError, match="no channel gates to inspect: GlobalContext, SimAM does not"):
        records.record_gates(nn.Sequential(SimAM(4), GlobalContext(8, 2)), [], 10)
    with pytest.raises(ConfigError, match="no images"):
        records.record_gates(nn.Sequential(ECA(4)), [], 10)
    idle = nn.Sequential(ECA(4), nn.Identity())
    idle[1].gate = ECA(4)
    with pytest.raises(ConfigError, match="the gate '1.gate' ran on none of these images, as in a detector that"):
        records.record_gates(idle, [(torch.randn(2, 4, 3, 3), None)], 1)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """The folder of a run of two epochs on digits, with its example images."""
    from ecanet.training import trainer as train

    recipe = recipes.find("quickstart")
    recipe = recipe.but(
        epochs=2, model=recipe.model.but(name="resnet8"), schedule=recipe.schedule.but(warmup_epochs=0.5)
    )
    return train.run(recipe, folder=tmp_path_factory.mktemp("run") / "digits", quiet=True).folder


def test_from_a_checkpoint_to_a_page(trained_folder, tmp_path):
    picture = sorted((trained_folder / "examples").glob("*.png"))[0]
    found = pages.run(trained_folder, tmp_path, classes=["3", "8"], image=picture)
    assert [one.name for one in found.records] == ["layer1.0.eca", "layer2.0.eca", "layer3.0.eca"]
    assert int(found.records[0].counts.sum()) == 360  # the held-out digits
    assert found.classes == [3, 8]
    for name in ("classes", "spread", "kernels", "image"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "inspect.json").read_text())["gates"]
    assert list(rows[0]["class_means"]) == ["3", "8"]
    kernel = found.task.model.get_submodule("layer2.0.eca.conv").weight.flatten().tolist()
    assert rows[1]["kernel"] == pytest.approx(kernel)
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("<svg") == 3 + 3 + 1 + 1  # classes and image have one for each gate, spread and kernels one
    assert page.count("<td data-name='gate'>") == 3
    assert picture.name in page


def test_an_image_file_is_prepared_as_the_data_are(trained_folder, tmp_path):
    """A held-out image must get the same answer from its file as in the data set."""
    from ecanet.training import predict

    picture = sorted((trained_folder / "examples").glob("*.png"))[0]
    found = pages.run(trained_folder, tmp_path, image=picture)
    (prediction,) = predict(found.task, [picture])
    assert found.answer == f"{picture.name}: {prediction.classes[0][0]}, {prediction.classes[0][1]:.1%}"
    share = prediction.classes[0][1]
    for effect in found.effects:
        assert effect.log_odds == pytest.approx(torch.tensor(share, dtype=torch.float64).logit().item(), rel=1e-3)
        assert effect.held != effect.log_odds


def test_channels_are_counted_in_whole_numbers():
    found = records.record_gates(nn.Sequential(SEVar2(4)), [(images(4), torch.tensor([0, 1, 0, 1]))], 2)
    figure = drawings.draw_weights(found).to_figure()
    figure.draw_without_rendering()
    ticks = figure.axes[0].get_xticks()
    assert len(ticks) > 2
    assert all(float(tick).is_integer() for tick in ticks)


NAMES = [r"a$\frac$", "$5_to_10_$", "_hidden", "long " * 50, "日本"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no Chinese signs
def test_class_names_are_drawn_as_they_are(name):
    """A name is no formula, and one with an underscore in front is in the legend like any other."""
    model = nn.Sequential(SEVar2(4))
    found = records.record_gates(model, [(images(4), torch.tensor([0, 1, 0, 1]))], 2)
    drawing = drawings.draw_classes(found, {0: name, 1: "other"})
    assert html.escape(figures.shorten(name)) in drawing.to_html()
    figure = drawing.to_figure()
    assert figures.to_png(figure).startswith(b"\x89PNG")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [name if len(name) < 25 else f"{name[:23]}…", "other", "all classes"]
    assert max(text.get_window_extent().x1 for text in legend.get_texts()) <= figure.bbox.x1


@pytest.mark.parametrize("nested", [False, True])
def test_files_that_are_left_out_are_named(tmp_path, monkeypatch, capsys, nested):
    """As `train` and `ablate` do."""
    monkeypatch.setattr(pages, "write", lambda *_: None)
    for part in ("train", "val") if nested else ("",):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.full((9, 9, 3), number * 60, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
            (folder / "notes.txt").touch()
    model = ecanet.create_model("resnet8", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    pages.run(
        tmp_path / "weights.pt",
        tmp_path / "out",
        model=recipes.ModelConfig(name="resnet8", attention="eca"),
        data_name=f"folder:{tmp_path / 'photos'}",
    )
    first = "val/cat/notes.txt" if nested else "cat/notes.txt"
    lines = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"ignored 2 files that are no images: {first}")


def test_classes_without_images_are_null_in_the_file(trained_folder, tmp_path, monkeypatch):
    """JSON has no NaN."""
    monkeypatch.setattr(pages, "write", lambda *_: None)
    found = pages.run(trained_folder, tmp_path, classes=["3"])
    broken = replace(found.records[0], class_means=torch.full_like(found.records[0].class_means, torch.nan))
    text = pages.to_json(replace(found, records=[broken]))
    row = json.loads(text, parse_constant=pytest.fail)["gates"][0]
    assert row["class_means"]["3"] == [None] * 16
    assert row["spread_between_classes"] is None
    assert None not in row["mean"]


def test_a_class_that_does_not_exist_is_refused(trained_folder, tmp_path):
    with pytest.raises(ConfigError, match="no class 'three'"):
        pages.run(trained_folder, tmp_path, classes=["three"])
