"""A network of three channels, trained on grey images: `export`, int8 and `push` give it three equal channels."""

import json

import pytest
import torch

import tiny_runs
from ecanet import from_pretrained, training
from ecanet.data.sources import SMALL_SETS
from ecanet.recipes import ModelConfig
from ecanet.studies.publishing import publish

GREY = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
NAMES = [("torchvision:shufflenet_v2_x0_5", 3), ("resnet20", 1)]


@pytest.fixture
def run(monkeypatch, tmp_path, request):
    tiny_runs.add_tiny(monkeypatch)
    tiny_runs.run(tiny_runs.TINY.but(epochs=1, model=ModelConfig(name=request.param)), tmp_path / "run")
    return tmp_path / "run"


def normalize(images, mean, std):
    mean, std = (torch.tensor(one)[:, None, None] for one in (mean, std))
    return (images.expand(-1, len(mean), -1, -1) / 255 - mean) / std


@pytest.mark.parametrize(("name", "channels"), NAMES)
def test_the_description_is_the_networks_and_not_the_images(monkeypatch, name, channels):
    tiny_runs.add_tiny(monkeypatch)
    recipe = tiny_runs.TINY.but(model=ModelConfig(name=name))
    task = training.Classification(recipe, SMALL_SETS["tiny"].spec).eval()
    images = training.describe_images(task)
    assert (images.channels, images.mean, images.std) == (channels, (0.4,) * channels, (0.3,) * channels)
    with torch.no_grad():
        expected = task(task.spec.normalize(GREY))
        assert torch.allclose(task.model(normalize(GREY, images.mean, images.std)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "channels"), NAMES, indirect=["run"])
def test_the_files_describe_what_the_network_takes(ecanet, run, channels, tmp_path):
    code, _, err = ecanet("export", run, "--to", "torchscript", "--out", "net.pt", "--no-check")
    assert code == 0, err
    extra = {"ecanet.json": ""}
    file = torch.jit.load(str(tmp_path / "net.pt"), _extra_files=extra)
    about = json.loads(extra["ecanet.json"])
    assert (about["channels"], len(about["mean"]), len(about["std"])) == (channels, channels, channels)
    task = training.restore(run)
    with torch.no_grad():
        expected = task(task.spec.normalize(GREY))
        assert torch.allclose(file(normalize(GREY, about["mean"], about["std"])), expected, rtol=1e-4, atol=1e-6)
        config = publish(run, tmp_path / "network")
        images = config.preprocessing
        loaded = from_pretrained(tmp_path / "network")
        assert torch.allclose(loaded(normalize(GREY, images.mean, images.std)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("run", [name for name, _ in NAMES], indirect=True)
def test_int8_takes_the_same(ecanet, run):
    code, out, err = ecanet("export", run, "--int8", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 20
