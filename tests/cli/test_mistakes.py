"""A mistake on the command line or in a call is one line with the value and the remedy, and leaves no files behind."""

import json

import pytest
import timm
import torch
import torchvision
from PIL import Image

import ecanet as library
from ecanet.cli.options import print_json
from ecanet.errors import AttachError, ConfigError
from ecanet.studies import cost

LINES = {
    "cost resnet50 --image-size -5": "the image size must be positive",
    "cost timm:resnet18 --attention eca --set reduction=4": "attention 'eca' has no option 'reduction'",
    "cost timm:resnet18 --set reduction=4": "reduction: these are options of an attention; name it",
    "models timm:resnet18 --kernel-sizes 5": "--kernel-sizes is about an attention: name it",
    "cost resnet50 --attention none --set reduction=4": "attention 'none' has no options, got reduction",
    "cost torchvision:r3d_18": "cannot be counted on an image",
    "ablate digits --threads 0": "--threads",
    "ablate digits --out taken": "--out taken: taken is a file",
    "paper 2 --out taken": "--out taken: taken is a file",
    "inspect nowhere --out taken": "--out taken: taken is a file",
    "detect nowhere taken --out taken": "--out taken: taken is a file",
    "detect nowhere taken --out taken/below": "--out taken/below: taken is a file",
    "detect nowhere pictures --out pictures/found": "the only images are those in --out pictures/found",
    "detect nowhere taken --device tpu": "unknown device 'tpu'; write auto, cpu, cuda, cuda:N or mps",
    "detect nowhere taken --on-corrupt maybe": "--on-corrupt must be error or skip",
    "paper 3 --device tpu": "unknown device 'tpu'; write auto, cpu, cuda, cuda:N or mps",
    "paper 3 --data-dir .": "used for accuracy only",
    "paper 5 --measure speed": "the paper prints no speed in table 5",
    "bench --device tpu": "unknown device 'tpu'; write auto, cpu, cuda, cuda:N or mps",
    "eval nowhere --on-corrupt maybe": "no checkpoint",
    "train digits --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "eval nowhere --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "predict nowhere pictures --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "detect nowhere taken --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "paper 3 --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "bench --device cuda:9": "no device 'cuda:9' on this machine; choose one of auto, cpu",
    "export rnus/mine": "no run or checkpoint at rnus/mine; a network is named NAME, timm:NAME or torchvision:NAME",
    "export foo": "unknown model 'foo'; choose one of resnet18",
    "export timm/resnet18": "unknown model 'timm/resnet18'; write timm:resnet18",
    "models timm/resnet18": "unknown model 'timm/resnet18'; write timm:resnet18",
    "cost timm/resnet18": "unknown model 'timm/resnet18'; write timm:resnet18",
    "train digits --model torchvision/resnet18": "unknown model 'torchvision/resnet18'; write torchvision:resnet18",
}


@pytest.mark.parametrize("line", LINES)
def test_a_mistake_on_the_command_line(ecanet, tmp_path, line):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "pictures" / "found").mkdir(parents=True)
    (tmp_path / "pictures" / "found" / "drawn.png").touch()
    code, out, err = ecanet(*line.split())
    assert (code, out) == (2, "")
    assert LINES[line] in err
    assert err.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(ecanet):
    assert "no device 'cuda' on this machine; choose one of auto, cpu" in ecanet("paper", "3", "--device", "cuda")[2]


def test_the_command_without_arguments_shows_help(ecanet):
    code, out, err = ecanet()
    assert (code, err) == (0, "")
    assert "train" in out


def test_a_long_network_name_is_not_cut_off(ecanet):
    _, out, _ = ecanet("cost", "resnet18", "torchvision:convnext_tiny")
    first = "".join(row.split("│")[1].strip() for row in out.splitlines() if row.startswith("│"))
    assert "torchvision:convnext_tiny" in first


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: library.attach(torchvision.models.resnet18(), wher="layer4"), "did you mean 'where'"),
        (lambda: library.attach(torchvision.models.resnet18(), kernel_size_s=3), "did you mean 'kernel_sizes'"),
        (lambda: library.attach(torchvision.models.resnet18(), preserve="no"), "preserve= takes True, False or None"),
        (lambda: library.create_model("resnet18", pretrained=True), "weights='torchvision'"),
        (lambda: library.create_model("resnet18", weigths="torchvision"), "did you mean 'weights'"),
        (lambda: library.create_model("resnet18", weights=True), "weights must be None, 'torchvision', a member"),
        (lambda: library.fuse(library.attach(torchvision.models.resnet18())), "detach, fuse, then attach again"),
    ],
)
def test_a_mistake_in_a_call(call, said):
    with pytest.raises((AttachError, ConfigError)) as caught:
        call()
    assert said in str(caught.value)


def test_a_fused_network_takes_lossless_gates():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    before = library.fuse(model)(x)
    assert torch.equal(library.attach(model)(x), before)


def test_replace_finds_modules_inside_the_selected_one():
    with pytest.warns(UserWarning, match="1 'se' modules gave way"):
        model = library.attach(torchvision.models.mobilenet_v3_small(), replace="se", where="features.1")
    assert [site.name for site in library.attached(model)] == ["features.1.block.1"]
    # a function selects each module by itself, not what is inside it
    with pytest.warns(UserWarning, match="8 'se' modules gave way"):
        library.attach(
            torchvision.models.mobilenet_v3_small(), replace="se", where=lambda name, m: name != "features.1.block.1"
        )
    with pytest.warns(UserWarning, match="gave way"):
        library.attach(torchvision.models.mobilenet_v3_small(), replace="se", where=lambda name, m: m.fc1 is not None)
    with pytest.raises(AttachError, match=r"where='features.0' selects none of the 9 'se' modules, such as 'features"):
        library.attach(torchvision.models.mobilenet_v3_small(), replace="se", where="features.0")


@pytest.mark.parametrize("attention", ["se-var1", "se-var2"])
def test_the_load_report_lists_gates_that_change_a_plain_networks_outputs(tmp_path, attention):
    torch.manual_seed(0)
    plain = library.create_model("resnet8", attention="none").eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = library.create_model("resnet8", attention=attention).eval()
    report = library.load_checkpoint(model, tmp_path / "plain.pth")
    x = torch.randn(2, 3, 32, 32)
    same = torch.allclose(model(x), plain(x), atol=1e-6)
    assert same == (not report.acting) == (attention == "se-var2")
    assert ("acting: 3" in str(report)) == (not same)


def test_cost_shows_no_attention_name_for_timms_networks_as_they_are():
    row = cost.make_table(["resnet18", "timm:resnet18"], attentions=["eca"])
    assert [r["attention"] for r in row] == ["eca", "", "eca"]
    assert row[1]["parameters"] == sum(p.numel() for p in timm.create_model("resnet18").parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["eval FILE", "predict FILE picture.png --json", "predict FILE picture.png"])
def test_weights_that_are_not_finite_are_refused(ecanet, tmp_path, command, value):
    model = library.create_model("resnet8", num_classes=10, in_channels=1)
    torch.nn.init.constant_(model.layer2[0].bn1.weight, value)
    torch.save(model.state_dict(), tmp_path / "FILE")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    code, out, err = ecanet(*command.split(), "--model", "resnet8", "--data", "digits", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "1 of its tensors hold NaN or infinity, first 'layer2.0.bn1.weight'" in err


def test_json_holds_no_nan(capsys):
    print_json({"loss": float("nan"), "rows": [(1.5, float("-inf"), None), "NaN"]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [[1.5, None, None], "NaN"],
    }
