"""int8 on real ImageNet weights with ECA: in each target right pictures stay right, and gates keep their effect."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision

import ecanet
from ecanet import ECA, deploy
from ecanet.errors import DataError

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore")]
PARTS = Path(__file__).resolve().parents[2] / "benchmarks" / "pretrained_parts"


class Pretrained:
    """MobileNetV2 with its weights, without gates: the 20 labelled pictures and the crops that give the ranges."""

    def __init__(self, packages, pictures):
        files = packages.fetch(download=False)
        see = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
        self.images = torch.stack([see(pictures.read(path)) for path in files.pictures])
        self.labels = torch.tensor([int(path.stem.split("_")[-1]) for path in files.pictures])
        self.crops = pictures.cut_crops(files.photographs)
        self.compute_logits = pictures.compute_logits
        self.make_network = lambda: pictures.make_network(files.weights)

    def compute_in_int8(self, model, target, folder, crops):
        """Return the logits of the pictures that the int8 file of ``model`` computes in the target's runtime."""
        for package in (*deploy.TARGETS[target].packages, *deploy.QUANTIZERS[target].packages):
            pytest.importorskip(package)
        path = folder / f"net{deploy.TARGETS[target].suffix}"
        held_out = self.images, self.labels
        deploy.quantize(model, path, target=target, calibration=crops, held_out=held_out)
        run = deploy.QUANTIZERS[target].open(path)
        return torch.cat([run(part) for part in self.images.split(deploy.QUANTIZERS[target].batch or 20)])


@pytest.fixture(scope="module")
def pretrained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(PARTS), *sys.path])
        for name in ("packages", "pictures"):
            patch.delitem(sys.modules, name, raising=False)
        import packages
        import pictures

        try:
            yield Pretrained(packages, pictures)
        except DataError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("target", deploy.QUANTIZERS)
def test_right_pictures_stay_right(pretrained, target, tmp_path):
    """With neutral gates at least 17 of the 18 right pictures stay right."""
    model = ecanet.attach(pretrained.make_network())
    right = pretrained.compute_logits(model, pretrained.images).argmax(1) == pretrained.labels
    assert int(right.sum()) == 18
    found = pretrained.compute_in_int8(model, target, tmp_path, pretrained.crops).argmax(1)
    assert int((right & (found == pretrained.labels)).sum()) >= 17


@pytest.mark.parametrize("target", deploy.QUANTIZERS)
def test_gates_change_the_logits_in_int8_as_in_float32(pretrained, target, tmp_path):
    """Gates away from neutral move the logits by 42 %; in int8 more than half of that arrives."""
    model = pretrained.make_network()
    plain = pretrained.compute_logits(model, pretrained.images)
    ecanet.attach(model)
    generator = torch.Generator().manual_seed(0)
    for gate in model.modules():
        if isinstance(gate, ECA):
            gate.conv.weight.data.normal_(0, 1, generator=generator)
    effect = pretrained.compute_logits(model, pretrained.images) - plain
    assert effect.norm() > 0.4 * plain.norm(), "without gates it would pass"
    found = pretrained.compute_in_int8(model, target, tmp_path, pretrained.crops[::3]) - plain
    # 1 if all that they do arrives, about 0 without gates. Measured: 0.90 (ONNX Runtime), 0.78 (OpenVINO).
    share = float((found * effect).sum() / effect.square().sum())
    print(f"{target}: {share:.3f} of the gates' effect arrives")
    assert 0.6 < share < 1.4
