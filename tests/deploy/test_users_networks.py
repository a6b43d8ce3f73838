"""`export`, `slim`, `quantize` and `optimize` take networks as users have them, or refuse them in one line."""

import errno
import resource
import types

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import ecanet
from ecanet import deploy, networks
from ecanet.deploy import checking
from ecanet.errors import EcanetError

X = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0)


def make(computed=None):
    """Return a small gated network, the weight of whose first convolution is computed by ``computed``."""
    torch.manual_seed(0)
    gate = ecanet.ECA(8)
    first = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(
        first, nn.BatchNorm2d(8), gate, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    if computed is not None:
        computed(first)
        model(X)  # with gradients, as a training step does it
    return model


def export(model, path, **settings):
    return ecanet.export(model, path, target="torchscript", example=X[:2], **settings)


def quantize(model, path):
    labels = torch.zeros(20, dtype=torch.long)
    return deploy.quantize(model, path, target="onnx", calibration=X[:20], held_out=(X[20:], labels))


@pytest.mark.parametrize("mode", ["training", "evaluation", "partly", "frozen"])
def test_the_network_is_not_changed(mode, tmp_path):
    model = make().train(mode in ("training", "frozen"))
    model[1].train(mode != "evaluation")
    model[0].requires_grad_(mode != "frozen")
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    export(model, tmp_path / "model.pt")
    ecanet.slim(model, X, budget=0.5)
    ecanet.optimize(model, example=X[:1])
    assert before == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])


@pytest.mark.parametrize(
    "computed",
    [
        utils.weight_norm,
        utils.spectral_norm,
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "parametrization", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_computed_weight_is_exported(computed, tmp_path):
    model = make(computed).eval()
    report = export(model, tmp_path / "model.pt")
    assert all(c.passed for c in report.comparisons)
    slimmed, _ = ecanet.slim(model, X, budget=0.5)
    assert slimmed(X).shape == (40, 4)
    assert [p.requires_grad for p in slimmed.parameters()] == [True] * len(list(slimmed.parameters()))


def fill_with_nan(model):
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    return model


BAD = {
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)), "lazy layers without weights; run it once"),
    "meta": (lambda: make().to("meta"), "has no data .* load its weights first"),
    "script": (lambda: torch.jit.trace(make().eval(), X[:1]), "is TorchScript, .* pass the network it was made from"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_network_that_cannot_be_copied_is_one_line(kind, tmp_path):
    build, message = BAD[kind]
    for use in (
        lambda: export(build(), tmp_path / "model.pt"),
        lambda: ecanet.slim(build(), X, budget=0.5),
        lambda: ecanet.optimize(build(), example=X[:1]),
        lambda: quantize(build(), tmp_path / "model.onnx"),
    ):
        with pytest.raises(EcanetError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_another_dtype_is_one_line(dtype, tmp_path):
    message = f"is in {str(dtype)[6:]}, and files are written in float32; pass copy.deepcopy"
    with pytest.raises(EcanetError, match=message):
        export(make().to(dtype), tmp_path / "model.pt")
    with pytest.raises(EcanetError, match=message):
        quantize(make().to(dtype), tmp_path / "model.onnx")


def test_nan_is_named(tmp_path):
    with pytest.raises(EcanetError, match="Sequential returns numbers that are not finite .* NaN in the weights"):
        export(fill_with_nan(make()), tmp_path / "model.pt")
    for model, images, message in (
        (fill_with_nan(make()), X, "not finite for these images; look for NaN in the images and the"),
        (make(), X * torch.nan, "images have NaN or infinity in them"),
    ):
        with pytest.raises(EcanetError, match=message):
            ecanet.slim(model, images, budget=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("cat", "dog")}, "classes has 2 names, and Sequential returns 4 logits"),
        ({"classes": None}, "classes must be a sequence of names, got None"),
        ({"classes": (1, 2, 3, 4)}, "classes must be a sequence of names"),
        ({"preprocessing": networks.Preprocessing(channels=1, mean=(0.5,), std=(0.5,))}, "1 channels, and the images"),
        ({"preprocessing": {"size": 16}}, r"preprocessing must be ecanet\.networks\.Preprocessing, got {'size': 16}"),
        ({"example": X[:2, :1]}, "Sequential does not run on the images 2x1x16x16: .*; give others"),
    ],
)
def test_a_description_that_contradicts_the_network_is_refused(settings, message, tmp_path):
    arguments = {"example": X[:2], "target": "torchscript"} | settings
    with pytest.raises(EcanetError, match=message):
        ecanet.export(make(), tmp_path / "model.pt", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plain.pt", "ein Netz ü 数.pt"])
def test_a_file_of_any_name_holds_the_gates(name, tmp_path):
    model = make().eval()
    nn.init.constant_(next(model[2].parameters()), 3.0)
    export(model, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert torch.allclose(torch.jit.load(str(tmp_path / name))(X), model(X), atol=1e-5)


@pytest.mark.parametrize("target", ["torchscript", "torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_old_file_stays(target, tmp_path):
    path = tmp_path / f"model{deploy.TARGETS[target].suffix}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(EcanetError, match=r"cannot be written \(File too large\); give another path"):
            ecanet.export(make(), path, target=target, example=X[:2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOENT])
def test_a_folder_that_takes_no_files_is_one_line(code, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, "no entry")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    for use, file in ((export, "model.pt"), (quantize, "model.onnx")):
        with pytest.raises(EcanetError, match=r"model\.\w+ cannot be written \(no entry\)"):
            use(make(), tmp_path / file)


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(EcanetError, match="File name too long"):
        export(make(), tmp_path / f"{'x' * 300}.pt")


def add_hook(model):
    model.layer1.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def exchange_activation(model):
    next(m for m in model.modules() if isinstance(m, nn.Sequential)).append(nn.Softplus())


def override_forward(model):
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x.flip(1)), model)


@pytest.mark.parametrize("change", [add_hook, exchange_activation, override_forward])
def test_a_network_that_its_description_does_not_compute_is_not_saved(change, tmp_path):
    torch.manual_seed(0)
    model = ecanet.create_model("resnet8", num_classes=4)
    ecanet.save_pretrained(model, tmp_path / "network")
    before = sorted((file.name, file.stat().st_mtime_ns) for file in (tmp_path / "network").iterdir())
    change(model)
    with pytest.raises(EcanetError, match="computes something else than resnet8 with the same weights") as caught:
        ecanet.save_pretrained(model, tmp_path / "network")
    assert "\n" not in str(caught.value)
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in (tmp_path / "network").iterdir())


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (lambda: 3, {}, "save_pretrained takes a network .* got 3"),
        (lambda: ecanet.create_model("resnet8").to("meta"), {}, "has no data .* load its weights first"),
        (BAD["lazy"][0], {}, BAD["lazy"][1]),
        (lambda: ecanet.create_model("resnet8"), {"class_names": "cat"}, "a sequence of names, got 'cat'"),
    ],
)
def test_what_cannot_be_saved_is_one_line(build, settings, message, tmp_path):
    with pytest.raises(EcanetError, match=message):
        ecanet.save_pretrained(build(), tmp_path / "network", **settings)
    assert list(tmp_path.iterdir()) == []
