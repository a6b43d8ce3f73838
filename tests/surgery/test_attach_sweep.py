"""Attach to networks of other libraries: a sample always, everything under the marker ``sweep``."""

import pytest
import torch

import attach_sweep as sweep

SAMPLE = (
    ("torchvision", "mobilenet_v2"),
    ("torchvision", "regnet_x_400mf"),
    ("torchvision", "squeezenet1_1"),
    ("timm", "convnext_atto"),
    ("timm", "dla34"),
    ("timm", "efficientnet_b0"),
    ("timm", "nf_resnet26"),
    ("timm", "res2net50_14w_8s"),
    ("timm", "resnetv2_18"),
    ("timm", "swiftformer_xs"),
    ("others", "deeplabv3"),
    ("others", "signals"),
)

NEEDS = {"smp": "segmentation_models_pytorch", "hf": "transformers", "yolo": "ultralytics", "monai": "monai"}

EVERYTHING = [
    *(("torchvision", name) for name in sweep.TORCHVISION),
    *(("timm", name) for name in sweep.TIMM),
    *(("others", name) for name in sweep.OTHERS),
]


def run(library, name):
    for prefix, package in NEEDS.items():
        if library == "others" and name.startswith(prefix):
            pytest.importorskip(package)
    if library == "timm":
        pytest.importorskip("timm")
    row = sweep.run_case(library, name)
    assert row["result"] == "pass", row["cause"]


@pytest.mark.parametrize(("library", "name"), SAMPLE)
def test_a_sample_of_networks_keeps_every_promise(library, name):
    run(library, name)


@pytest.mark.sweep
@pytest.mark.parametrize(("library", "name"), [case for case in EVERYTHING if case not in SAMPLE])
def test_all_networks_keep_every_promise(library, name):
    run(library, name)


def test_a_wrong_gate_is_noticed(monkeypatch):
    # the checks can fail: a gate of 1.001 changes outputs
    import ecanet

    monkeypatch.setattr(ecanet.ECA, "neutralize", lambda self: setattr(self, "gain", 2.002))
    row = sweep.run_case("others", "signals")
    assert row["result"] == "fail"
    assert "the outputs of Sequential would change" in row["cause"]
    monkeypatch.setattr(ecanet.surgery.proof.Insertion, "prove", lambda self: None)
    row = sweep.run_case("others", "signals")
    assert row["result"] == "fail"
    assert "outputs differ" in row["cause"]


def test_randomised_networks_hide_nothing():
    model, _ = sweep.signals()
    norm = model[1].branch[4]
    torch.nn.init.zeros_(norm.weight)
    sweep.randomize(model)
    assert norm.weight.abs().min() > 0.1
    assert (norm.running_mean != 0).all()
