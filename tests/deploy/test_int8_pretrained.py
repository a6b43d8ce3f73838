"""int8 on real ImageNet weights with neutral ECA: at least 17 of the 18 right pictures stay right in each target."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision

import ecanet
from ecanet import deploy
from ecanet.errors import DataError

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore")]
PARTS = Path(__file__).resolve().parents[2] / "benchmarks" / "pretrained_parts"


@pytest.mark.parametrize("target", deploy.QUANTIZERS)
def test_right_pictures_stay_right(target, tmp_path, monkeypatch):
    for package in (*deploy.TARGETS[target].packages, *deploy.QUANTIZERS[target].packages):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "path", [str(PARTS), *sys.path])
    for name in ("packages", "pictures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import packages
    import pictures

    try:
        files = packages.fetch(download=False)
    except DataError as error:
        pytest.skip(str(error))
    see = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    images = torch.stack([see(pictures.read(path)) for path in files.pictures])
    labels = torch.tensor([int(path.stem.split("_")[-1]) for path in files.pictures])
    model = ecanet.attach(pictures.make_network(files.weights))
    right = pictures.compute_logits(model, images).argmax(1) == labels
    assert int(right.sum()) == 18
    path = tmp_path / f"net{deploy.TARGETS[target].suffix}"
    calibration = pictures.cut_crops(files.photographs)
    deploy.quantize(model, path, target=target, calibration=calibration, held_out=(images, labels))
    run = deploy.QUANTIZERS[target].open(path)
    found = torch.cat([run(part) for part in images.split(deploy.QUANTIZERS[target].batch or 20)]).argmax(1)
    assert int((right & (found == labels)).sum()) >= 17
