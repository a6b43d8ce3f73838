"""Other libraries' networks, and a user's own, train and are used by the same commands as this library's."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet import attached
from ecanet.training import predict, restore

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.up(self.down(x))).mean((2, 3)))

def make(num_classes=10):
    return Net(num_classes)
"""

slow = pytest.mark.slow


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Return a flat folder of 24 pictures, with a user's own network beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for level, name in enumerate(("dark", "grey", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for at in range(8):
            pixels = rng.integers(0, 60, (64, 64, 3)) + 90 * level
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{at}.png")
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "name",
    [
        "mine.py:make",
        pytest.param("torchvision:mobilenet_v2", marks=slow),
        pytest.param("torchvision:regnet_y_400mf", marks=slow),
        pytest.param("timm:resnet26d", marks=slow),
        pytest.param("timm:efficientnet_b0", marks=slow),
        pytest.param("timm:convnext_atto", marks=slow),
    ],
)
def test_the_same_commands_for_any_network(ecanet, photos, tmp_path, name):
    options = ["--model", name, "--weights", "none", "--device", "cpu", "--batch-size", 6]
    options += ["--set", "data.image_size=32", "--set", "data.workers=0"]
    code, out, err = ecanet("train", "folder:photos", *options, "--epochs", 2, "--out", "run")
    assert (code, err) == (0, "")
    assert "proven: each acts as often as its place" in out
    made = json.loads((tmp_path / "run" / "network.json").read_text())
    assert made["attached"]
    task = restore("run")
    assert [site.name for site in attached(task.model)] == made["attached"]
    code, out, _ = ecanet("eval", "run", "--device", "cpu", "--json")
    assert code == 0
    last = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(out).keys() <= last["metrics"].keys() | last.keys() | {"val_loss", "top1"}
    code, out, _ = ecanet("predict", "run", "photos/dark", "--device", "cpu", "--json")
    assert (code, len(json.loads(out))) == (0, 8)
    cam = ["--cam"] if find_spec("pytorch_grad_cam") else []  # an optional package
    assert ecanet("inspect", "run", *cam, "--out", "inspection")[0] == 0
    assert (tmp_path / "inspection" / "cams.png").exists() == bool(cam)
    code, _, err = ecanet("train", "--resume", "run", "--epochs", 3, "--device", "cpu")
    assert (code, err) == (0, "")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4
    arms = ["--variants", "none,eca-adaptive", "--seeds", 2, "--out", "arms", *options[:4], *options[8:]]
    code, out, err = ecanet("ablate", "folder:photos", *arms, "--epochs", 1, "--set", "data.batch_size=6")
    assert code == 0, err
    assert "eca-adaptive" in out


def test_a_network_in_a_file_that_has_changed_is_not_run(ecanet, photos, tmp_path):
    options = ["--weights", "none", "--device", "cpu", "--set", "data.image_size=32", "--set", "data.workers=0"]
    assert ecanet("train", "folder:photos", "--model", "mine.py:make", *options, "--epochs", 1, "--out", "run")[0] == 0
    (tmp_path / "mine.py").write_text(OWN.replace("mean((2, 3))", "amax((2, 3))"))
    code, _, err = ecanet("eval", "run", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--model {tmp_path / 'mine.py'}:make" in err
    code, _, err = ecanet("eval", "run", "--device", "cpu", "--model", "mine.py:make")
    assert (code, err) == (0, "")


def test_images_from_memory_are_classified_as_files_are(ecanet, photos):
    options = ["--model", "mine.py:make", "--weights", "none", "--device", "cpu", "--set", "data.image_size=32"]
    assert ecanet("train", "folder:photos", *options, "--set", "data.workers=0", "--epochs", 1, "--out", "run")[0] == 0
    task = restore("run")
    path = photos / "grey" / "0.png"
    pixels = np.asarray(Image.open(path))
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    answers = list(predict(task, [path, Image.open(path), pixels, tensor, tensor.float() / 255], device="cpu"))
    assert len({answer.classes for answer in answers}) == 1
    assert [answer.path for answer in answers] == [str(path), *(f"image {at}" for at in range(1, 5))]
    wrong = [np.zeros((4, 4, 3)), torch.zeros(3, 4, 4) - 1, torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
    assert all("image" in str(answer) or "tensor" in str(answer) for answer in predict(task, wrong, device="cpu"))


def test_a_network_in_a_file_is_counted_where_the_command_names_it(ecanet, photos):
    for command in (
        ["cost", "mine.py:make"],
        ["models", "mine.py:make"],
        ["models", "mine.py:make", "--attach", "eca"],
    ):
        code, out, err = ecanet(*command)
        assert (code, err) == (0, "")
        assert "mine.py:make" in out.replace("\n", "")
