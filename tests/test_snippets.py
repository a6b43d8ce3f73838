"""The Python of every page of the documentation runs.

Each block begins with the names of `stand_ins` and those that earlier blocks of its page have made; small networks
stand in for large ones. tests/test_readme.py runs the READMEs' Python, and tests/test_site.py compares the start pages.
"""

import builtins
import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import ecanet as library
import fake_hub
from ecanet import recipes, training
from published_networks import randomize
from snippets import LANGUAGES, PAGES, ROOT, Snippet, find_snippets
from tiny_runs import TINY, add_tiny

DOCS = [page for page in PAGES if page.parent != ROOT]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

SWEEP = {
    "yolo.md": "ultralytics",
    "segmentation.md": "segmentation_models_pytorch",
    "hugging-face.md": "transformers",
    "graphs.md": "onnx2torch",
}
"""Pages whose Python needs a package that only `make sweep` installs."""

DEPLOY = {"openvino.md": "openvino", "executorch.md": "executorch"}
"""Pages whose Python needs a package that only `make test-deploy` installs."""

SLOW = {
    "ablation.md": "fifteen runs",
    "training.md": "a run of four epochs",
    "int8.md": "calibrates a network",
    "hub.md": "writes networks",
    "export.md": "exports a network, by the lines with which onnx.md begins",
    "detection.md": "builds a Mask R-CNN over ResNet-50",
}
"""Pages whose Python takes more than a second or two."""

OFFLINE = {
    'YOLO("yolo11n.pt")': 'YOLO("yolo11n.yaml", verbose=False)',
    'data="coco8.yaml"': 'data=SMALL_SET, epochs=1, imgsz=64, batch=2, workers=0, device="cpu", plots=False',
    'encoder_weights="imagenet"': "encoder_weights=None",
    'from_pretrained("microsoft/resnet-18")': "from_config(SMALL_CONFIG)",
    'weights="DEFAULT"': "weights=None",
    '"quickstart", loggers="mlflow"': 'recipes.find("quickstart"), loggers="csv"',
    'weights="torchvision"': "weights=None",
}
"""What downloads, and what stands in for it."""


@by_name
def test_every_fence_says_its_language(page):
    assert {snippet.language for snippet in find_snippets(page)} <= LANGUAGES
    if page in DOCS:  # a fence has a button that copies it
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"^\n    (ecanet|pip|make|python) ", prose, re.MULTILINE)


# Python


class Network(torchvision.models.ResNet):
    """The names of a ResNet-50, with one block in each stage and an eighth of the channels."""

    def __init__(self, num_classes=10, weights=None):
        super().__init__(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
        self.fc = nn.Linear(256, num_classes)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 8, *args, **options)


class PastedECA(nn.Module):
    """The authors' module, as people paste it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None]
        return x * y.sigmoid()


class MyGate(library.ChannelAttention):
    def gate(self, p):
        return torch.sigmoid(p)


class MyAttention(nn.Module):
    def forward(self, x):
        return x * x.amax((2, 3), keepdim=True).sigmoid()


def make_replaceable() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), PastedECA(), nn.ReLU(), nn.Conv2d(16, 16, 3), MyAttention()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def stand_ins(page: str) -> dict[str, object]:
    """Return the names that every block of the page may use, made anew for each of them."""
    torch.manual_seed(0)
    model = make_replaceable() if page == "replace.md" else Network(num_classes=2).eval()
    return {
        "ecanet": library,
        "torch": torch,
        "torchvision": torchvision,
        "recipes": recipes,
        "training": training,
        "resnet50": Network,
        "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
        "model": model,
        "plain": Network().state_dict(),
        "image": torch.rand(2, 3, 64, 64),
        "images": torch.rand(2, 3, 64, 64),
        "others": torch.rand(6, 3, 64, 64),
        "labels": torch.arange(6) % 2,
        "names": [str(n) for n in range(1000)],
        "MyGate": MyGate,
        "MyAttention": MyAttention,
    }


SMALLER = {"resnet50": "resnet18"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, with what the pages load from it; networks that are large elsewhere are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "resnet50", Network)
    monkeypatch.setattr(torchvision.models, "resnet18", lambda **options: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], **options
    ))  # fmt: skip
    create = library.create_model
    monkeypatch.setattr(library, "create_model", lambda name, **options: create(SMALLER.get(name, name), **options))
    torch.save(library.attach(Network()).state_dict(), "attached.pt")
    return tmp_path


def run_page(page: Path) -> int:
    """Run the Python of a page, and return how many blocks that were."""
    names: dict[str, object] = {}
    count = 0
    for snippet in find_snippets(page):
        if snippet.language == "python":
            names = {**stand_ins(snippet.page), **names}
            run_block(snippet, names)
            count += 1
    return count


def run_block(snippet: Snippet, names: dict[str, object]) -> None:
    """Run a block of Python; one whose page calls its lines alternatives, line by line."""
    code = snippet.code
    for online, offline in OFFLINE.items():
        code = code.replace(online, offline)
    parts = code.splitlines() if offers_alternatives(snippet) else [code]
    for part in parts:
        if len(parts) > 1:
            names = {**names, **stand_ins(snippet.page)}
        exec(compile(part, snippet.place, "exec"), names)


def offers_alternatives(snippet: Snippet) -> bool:
    """Return whether the sentence before a block says that each of its lines is one alternative."""
    before = (ROOT / "docs" / snippet.page).read_text().splitlines()[: snippet.line - 1]
    return "alternative" in " ".join(before[-3:])


QUICK = [page for page in DOCS if page.name not in {*SWEEP, *DEPLOY, *SLOW, "index.zh-CN.md"}]
PYTHON = [page for page in QUICK if any(snippet.language == "python" for snippet in find_snippets(page))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, folder):
    assert run_page(page)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW)
def test_the_slow_python_of_a_page_runs(name, folder, monkeypatch):
    add_tiny(monkeypatch)
    monkeypatch.setattr(recipes, "find", lambda name: TINY.but(model=TINY.model.but(name="resnet8"), epochs=1))
    if name == "hub.md":
        library.save_pretrained(library.create_model("resnet8"), "my-network")
        with fake_hub.serve() as hub:
            fake_hub.answer_for_the_hub(monkeypatch, hub, folder)
            monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
            assert run_page(ROOT / "docs" / name)
        assert "me/another" in hub.repos
    else:
        assert run_page(ROOT / "docs" / name)


@pytest.mark.deploy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DEPLOY)
def test_the_python_of_a_page_about_another_runtime_runs(name, folder):
    pytest.importorskip(DEPLOY[name])
    assert run_page(ROOT / "docs" / name)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SWEEP)
def test_the_python_of_a_page_about_another_library_runs(name, folder, monkeypatch):
    pytest.importorskip(SWEEP[name])
    if name == "hugging-face.md":
        use_a_small_configuration(monkeypatch)
    if name == "graphs.md":
        network = Network().eval()
        randomize(network)  # the exporter writes equal tensors once, in a form that onnx2torch does not know
        torch.onnx.export(network, (torch.rand(2, 3, 64, 64),), "model.onnx", dynamo=False)
    if name == "yolo.md":
        monkeypatch.setattr(builtins, "SMALL_SET", str(write_boxes(folder)), raising=False)
    assert run_page(ROOT / "docs" / name)


def write_boxes(folder: Path) -> Path:
    """Write two pictures, each with a box, in YOLO's layout, and return the file that describes the set."""
    for name in ("a", "b"):
        for kind in ("images", "labels"):
            (folder / kind).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(folder / "images" / f"{name}.png")
        (folder / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    described = folder / "small.yaml"
    described.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return described


def use_a_small_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers build a small ResNet where the page downloads one."""
    from transformers import ResNetConfig

    small = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], layer_type="basic")
    monkeypatch.setattr(builtins, "SMALL_CONFIG", small, raising=False)
