"""Files as other people wrote them: real key names and shapes, random values."""

import os
import pickle

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.errors import CheckpointError
from ecanet.models.checkpoints import load_state_dict
from published_networks import GATES, authors_file, authors_state, randomize, recompute

# The deeper networks have the blocks of resnet18 or resnet50, only more of them.
DEEPEST = ("resnet34", "resnet101", "resnet152")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEEPEST)) for name in GATES])
def test_the_authors_files_load_whole_and_mean_what_they_say(name, tmp_path):
    authors_file(tmp_path / "model_best.pth.tar", name)
    model = ecanet.create_model(name, kernel_sizes="official").eval()
    report = ecanet.load_checkpoint(model, tmp_path / "model_best.pth.tar")
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], [])
    assert report.complete
    assert report.resized == {}
    state = authors_state(name)
    assert sorted(report.matched) == sorted(state)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x), recompute(name, wide, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("built", ["official", "adaptive", 9])
def test_kernel_sizes_come_from_the_file(built, tmp_path):
    authors_file(tmp_path / "file.pth", "resnet18")
    model = ecanet.create_model("resnet18", kernel_sizes=built).eval()
    report = ecanet.load_checkpoint(model, tmp_path / "file.pth")
    assert report.complete
    assert [model.get_submodule(f"layer{s}.0.eca").kernel_size for s in (1, 2, 3, 4)] == [3, 5, 7, 7]
    assert len(report.resized) == {"official": 0, "adaptive": 4, 9: 8}[built]
    official = ecanet.create_model("resnet18").eval()
    ecanet.load_checkpoint(official, tmp_path / "file.pth")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x), official(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model._orig_mod.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_prefixes_and_wrappers(prefix, wrapper, tmp_path):
    source = randomize(ecanet.create_model("resnet20", num_classes=10))
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "file.pt")
    model = ecanet.create_model("resnet20", num_classes=10)
    assert ecanet.load_checkpoint(model, tmp_path / "file.pt").complete
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_timms_names(tmp_path):
    """timm keeps ECA under `se`; its file for a plain ResNet-18 with ECA loads into ours, and gives its outputs."""
    timm = pytest.importorskip("timm")
    theirs = randomize(timm.create_model("resnet18", block_args={"attn_layer": "eca"}))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert "layer1.0.se.conv.weight" in theirs.state_dict()
    model = ecanet.create_model("resnet18").eval()
    assert ecanet.load_checkpoint(model, tmp_path / "timm.pth").complete
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_plain_file_leaves_the_gates_neutral(tmp_path):
    theirs = randomize(torchvision.models.resnet18())
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    model = randomize(ecanet.create_model("resnet18"))
    report = ecanet.load_checkpoint(model, tmp_path / "plain.pth")
    assert len(report.neutral) == 8
    assert all("eca" in name for name in report.missing)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x), theirs(x))
    report.require_backbone()


def test_reports_say_what_was_left(tmp_path):
    torch.save(ecanet.create_model("resnet20", num_classes=10).state_dict(), tmp_path / "ten.pth")
    model = ecanet.create_model("resnet20", num_classes=4, attention="se", reduction=4)
    report = ecanet.load_checkpoint(model, tmp_path / "ten.pth")
    assert report.mismatched == ["fc.weight", "fc.bias"]
    assert len(report.unexpected) == 9
    assert "unexpected: 9 (layer1.0.eca.conv.weight" in str(report)
    assert "mismatched: 2 (fc.weight, fc.bias)" in str(report)
    report.require_backbone()
    with pytest.raises(CheckpointError, match="first 'conv1.weight'"):
        load_state_dict(ecanet.create_model("resnet20", in_channels=1), model.state_dict()).require_backbone()
    with pytest.raises(CheckpointError, match="'conv1.weight'"):
        ecanet.create_model("resnet20", in_channels=1, weights=tmp_path / "ten.pth")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "damage", ["missing", "folder", "empty", "text", "truncated", "pickle", "code", "list", "foreign"]
)
def test_bad_files_are_named_in_one_line(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    match damage:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("hello\n")
        case "truncated":
            torch.save(ecanet.create_model("resnet20").state_dict(), path)
            path.write_bytes(path.read_bytes()[:5000])
        case "pickle":
            path.write_bytes(pickle.dumps({"conv1.weight": Evil()}))
        case "code":
            torch.save({"state_dict": {"conv1.weight": Evil()}}, path)
        case "list":
            torch.save([1, 2, 3], path)
        case "foreign":
            torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError) as error:
        ecanet.load_checkpoint(ecanet.create_model("resnet20"), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
    says = {
        "missing": "no checkpoint at",
        "code": "may run code",
        "pickle": "may run code",
        "foreign": "shares no tensor",
    }
    assert says.get(damage, str(path)) in str(error.value)
