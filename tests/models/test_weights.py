"""``weights=`` and `load_checkpoint`: files, state dicts, torchvision's enums, and the report that is kept."""

import copy

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights, ResNet50_Weights

import ecanet
from ecanet.errors import CheckpointError, ConfigError
from published_networks import randomize


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Put a synthetic file where torchvision keeps ResNet-18's weights after a download; return its network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = randomize(torchvision.models.resnet18())
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    return theirs


def test_a_member_of_torchvisions_enums_names_the_weights(downloaded):
    model = ecanet.create_model("resnet18", weights=ResNet18_Weights.IMAGENET1K_V1).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x), downloaded(x))
    assert model.load_report.source == "torchvision's weights ResNet18_Weights.IMAGENET1K_V1"


def test_a_member_of_another_network_is_refused_in_one_line():
    with pytest.raises(CheckpointError) as caught:
        ecanet.create_model("resnet18", weights=ResNet50_Weights.IMAGENET1K_V2)
    assert str(caught.value) == (
        "ResNet50_Weights.IMAGENET1K_V2 is not made for 'resnet18'; choose one of ResNet18_Weights.IMAGENET1K_V1"
    )
    with pytest.raises(ConfigError, match="a member such as ResNet50_Weights.IMAGENET1K_V1 or a checkpoint's path"):
        ecanet.create_model("resnet18", weights=ResNet50_Weights)


def test_the_report_stays_with_the_model(downloaded):
    model = ecanet.create_model("resnet18", attention="se", weights="torchvision", num_classes=3)
    assert model.load_report.mismatched == ["fc.weight", "fc.bias"]
    assert len(model.load_report.neutral) == 8
    assert copy.deepcopy(model).load_report == model.load_report
    assert not [key for key in model.state_dict() if "report" in key]
    assert ecanet.create_model("resnet20").load_report is None


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_a_state_dict_loads_like_its_file(wrapper, tmp_path):
    state = randomize(ecanet.create_model("resnet20", num_classes=10, kernel_sizes=5)).state_dict()
    state = {f"module.{key}": value for key, value in state.items()}
    content = {wrapper: state, "epoch": 3} if wrapper else state
    torch.save(content, tmp_path / "file.pt")
    one, other = (ecanet.create_model("resnet20", num_classes=10) for _ in range(2))
    given = ecanet.load_checkpoint(one, content)
    read = ecanet.load_checkpoint(other, tmp_path / "file.pt")
    assert given.complete
    assert (given.matched, given.resized) == (read.matched, read.resized)
    assert given.resized
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize(("content", "says"), [({}, "holds no state dict"), ({"a": torch.ones(1)}, "shares no tensor")])
def test_a_state_dict_that_does_not_fit_is_an_error(content, says):
    with pytest.raises(CheckpointError, match=f"the state dict {says}"):
        ecanet.load_checkpoint(ecanet.create_model("resnet20"), content)
