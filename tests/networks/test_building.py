"""Any classifier by its name: with weights, a head for the classes at hand, and proven gates."""

import pytest
import torch

from ecanet import attached, detach
from ecanet.errors import CheckpointError, ConfigError
from ecanet.networks import build, find
from ecanet.recipes import ModelConfig

IMAGE = (3, 40, 40)
LARGE = pytest.param("timm:resnet26d", marks=pytest.mark.slow)
OTHERS = ["torchvision:mobilenet_v2", LARGE, "timm:convnext_atto", "torchvision:squeezenet1_1"]


def make(name, weights=None, **settings):
    return build(ModelConfig(name=name, weights=weights, **settings), num_classes=3, image=IMAGE)


def spread(model, generator):
    """Give every parameter and statistic of ``model`` values that are all different."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
            value.add_(0.01 * torch.rand(value.shape, generator=generator))
    return model


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", [*OTHERS, "mobilenet_v2", "resnet20"])
def test_weights_for_other_classes_change_nothing_but_the_head(name, generator, tmp_path):
    plain = find(name, **({"attention": "none"} if ":" not in name else {}))
    torch.save(spread(plain, generator).state_dict(), tmp_path / "weights.pth")
    built = make(name, str(tmp_path / "weights.pth"))
    exchanged = set(built.exchanged)
    assert exchanged
    assert all(key.startswith(f"{built.head}.") for key in exchanged)
    own = dict(built.model.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(own[key], value) != (key in exchanged)
    assert not any(own[key].any() for key in exchanged)
    assert "new head" in "\n".join(built.describe())
    if ":" in name:
        assert built.to_dict()["attached"] == [site.name for site in attached(built.model)]
        assert all(site.calls for site in attached(built.model))
    x = torch.rand(2, *IMAGE, generator=generator)
    bare = make(name, str(tmp_path / "weights.pth"), attention="none").model.eval()
    assert torch.equal(built.model.eval()(x), bare(x))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", LARGE, "mobilenet_v2"])
def test_a_file_with_gates_gives_them_back(name, generator, tmp_path):
    trained = spread(make(name).model, generator)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    again = make(name, str(tmp_path / "trained.pth"))
    assert not again.exchanged
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in again.model.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "mobilenet_v2"])
def test_gates_begin_neutral_or_as_initialised(name, generator, tmp_path):
    plain = find(name, **({"attention": "none"} if ":" not in name else {}))
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    x = torch.rand(2, *IMAGE, generator=generator)

    def logits(weights, **settings):
        torch.manual_seed(0)
        built = build(ModelConfig(name=name, weights=weights, **settings), num_classes=1000, image=IMAGE)
        return built.model.eval()(x)

    weights = str(tmp_path / "w.pth")
    plain = logits(weights, attention="none")
    assert torch.equal(logits(weights), plain)
    assert torch.equal(logits(weights, preserve=True), plain)
    assert not torch.equal(logits(weights, preserve=False), plain)


def test_a_random_network_has_the_papers_gates_unless_they_are_to_preserve():
    gains = [{m.gain for m in make("resnet20", preserve=p).model.modules() if hasattr(m, "gain")} for p in (None, True)]
    assert gains == [{1.0}, {2.0}]


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_where_chooses_the_blocks(name):
    model = make(name, where="layer4.*").model
    assert [site.name for site in attached(model)] == ["layer4.0.eca", "layer4.1.eca"]
    detach(model)


def test_squeeze_excite_gives_way():
    with pytest.warns(UserWarning, match="gave way"):
        built = make("timm:efficientnet_b0", replace="se")
    assert len(built.to_dict()["attached"]) == 16
    assert {site.note for site in attached(built.model)} >= {"in place of SqueezeExcite; outputs changed when attached"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet20", {"replace": "se"}, "replace='se' is for other libraries' networks"),
        ("resnet20", {"attention": "none", "where": "layer1"}, "are about attention, and attention is 'none'"),
        ("torchvision:fcn_resnet50", {}, "is no classifier: it is for segmentation, and there are no data"),
        ("torchvision:resnet51", {}, "did you mean torchvision:resnet"),
        ("keras:resnet50", {}, "unknown library 'keras'"),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(name, **settings)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(find("torchvision:resnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="does not fit|fits"):
        make("torchvision:resnet34", str(tmp_path / "w.pth"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = find("torchvision:squeezenet1_1").state_dict()
    state["features.0.weight"][0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        make("torchvision:squeezenet1_1", str(tmp_path / "w.pth"))
