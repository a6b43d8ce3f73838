"""A network in a folder: another process loads it from the folder alone, bit for bit; hostile folders are refused."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import ecanet
from ecanet.errors import CheckpointError, ConfigError, EcanetError
from ecanet.networks import Preprocessing

NAMES = ("ant", "bee", "cicada")


def randomize(model: nn.Module) -> nn.Module:
    """Change every tensor, so that a network built anew cannot be taken for this one."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim():
            value.add_(0.02 * (torch.rand(value.shape, generator=generator) - 0.5))
    return model.eval()


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in mine.items()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model = ecanet.create_model("resnet8", num_classes=3, kernel_sizes=(3, 5, 3))
    folder = tmp_path_factory.mktemp("saved") / "net"
    images = Preprocessing(size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop=1.0, interpolation="bicubic")
    ecanet.save_pretrained(randomize(model), folder, class_names=NAMES, preprocessing=images)
    return folder


def make_networks() -> dict[str, tuple[Any, dict[str, Any]]]:
    small = Preprocessing(size=64)
    return {
        "ours, other options": (
            lambda: ecanet.create_model("resnet8", attention="se", reduction=4, num_classes=4, in_channels=1),
            {"preprocessing": Preprocessing(channels=1, size=16, mean=(0.5,), std=(0.5,))},
        ),
        "ours, kernel sizes of a file": (lambda: _resize(ecanet.create_model("resnet8", num_classes=3)), {}),
        "ours, attached to the plain one": (
            lambda: ecanet.attach(ecanet.create_model("resnet14", attention="none", num_classes=3), where="layer3.*"),
            {},
        ),
        "ours in half precision": (lambda: ecanet.create_model("resnet8", num_classes=3).half(), {}),
        "torchvision's": (
            lambda: ecanet.attach(torchvision.models.squeezenet1_1(num_classes=5), "ese"),
            {"network": "torchvision:squeezenet1_1", "preprocessing": small},
        ),
        "timm's, with SE exchanged": (
            lambda: ecanet.attach(timm.create_model("regnety_002", num_classes=3), replace="se", kernel_sizes=5),
            {"preprocessing": small},
        ),
        "plain": (lambda: torchvision.models.resnet18(num_classes=3), {"network": "torchvision:resnet18"}),
    }


def _resize(model: nn.Module) -> nn.Module:
    wider = ecanet.create_model("resnet8", num_classes=3, kernel_sizes=7)
    ecanet.load_checkpoint(model, wider.state_dict())
    return model


@pytest.mark.filterwarnings("ignore:.*gave way to 'eca'")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in ("plain", "timm's, with SE exchanged") else kind
        for kind in make_networks()
    ],
)
def test_every_tensor_and_gate_comes_back(kind, tmp_path):
    make, settings = make_networks()[kind]
    model = randomize(make())
    config = ecanet.save_pretrained(model, tmp_path / "net", **settings)
    loaded = ecanet.from_pretrained(tmp_path / "net")
    assert same_tensors(loaded, model)
    assert not loaded.training
    assert loaded.pretrained_config == config
    gates = [type(m).__name__ for m in model.modules() if isinstance(m, ecanet.ChannelAttention)]
    assert [type(m).__name__ for m in loaded.modules() if isinstance(m, ecanet.ChannelAttention)] == gates
    assert len(config.sites) == len(gates)
    image = torch.rand(2, config.preprocessing.channels, 64, 64, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    # A loaded network is saved again without being told anything.
    assert ecanet.save_pretrained(loaded, tmp_path / "again") == config


LOAD = """
import json, sys, torch, ecanet
model = ecanet.from_pretrained(sys.argv[1])
about = model.pretrained_config
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    logits = model(torch.rand(1, 3, 16, 16, generator=generator))
print(json.dumps([logits.tolist(), about.class_names, about.preprocessing.mean, about.preprocessing.size,
                  sorted(name for name, m in model.named_modules() if isinstance(m, ecanet.ECA))]))
"""


def test_another_process_loads_it_from_the_folder_alone(saved, tmp_path):
    moved = shutil.copytree(saved, tmp_path / "moved")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "empty")}
    found = subprocess.run(
        [sys.executable, "-c", LOAD, moved], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    logits, names, mean, size, gates = json.loads(found.stdout)
    here = ecanet.from_pretrained(saved)
    with torch.no_grad():
        expected = here(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert logits == expected.tolist()
    assert (tuple(names), mean, size) == (NAMES, [0.1, 0.2, 0.3], 16)
    assert gates == ["layer1.0.eca", "layer2.0.eca", "layer3.0.eca"]
    assert [here.get_submodule(gate).kernel_size for gate in gates] == [3, 5, 3]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_their_libraries_load_the_plain_part(library, tmp_path):
    """The tensors beside the gates fit the plain network strictly, and give the outputs of neutral gates."""
    make = {
        "torchvision": lambda: torchvision.models.squeezenet1_1(num_classes=3),
        "timm": lambda: timm.create_model("resnet10t", num_classes=3),
    }[library]
    model = ecanet.attach(randomize(make()))
    name = {"network": "torchvision:squeezenet1_1"} if library == "torchvision" else {}
    ecanet.save_pretrained(model, tmp_path / "net", **name, preprocessing=Preprocessing(size=64))
    sites = json.loads((tmp_path / "net" / "config.json").read_text())["sites"]
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    plain = {key: value for key, value in tensors.items() if not key.startswith(tuple(f"{gate}." for gate in sites))}
    assert len(plain) < len(tensors)
    theirs = make().eval()
    theirs.load_state_dict(plain, strict=True)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(image), model.eval()(image))


@pytest.mark.slow
def test_our_network_is_torchvisions_beside_its_gates(tmp_path):
    model = randomize(ecanet.create_model("resnet18", num_classes=3))
    ecanet.save_pretrained(model, tmp_path / "net")
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    plain = {key: value for key, value in tensors.items() if ".eca." not in key}
    torchvision.models.resnet18(num_classes=3).load_state_dict(plain, strict=True)


class Unknown(nn.Module):
    """A network that no name stands for."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)


def attach_twice() -> nn.Module:
    model = ecanet.attach(timm.create_model("resnet10t", num_classes=3), where="layer1.*")
    return ecanet.attach(model, "se", where="layer2.*")


def attach_by_function() -> nn.Module:
    return ecanet.attach(timm.create_model("resnet10t"), where=lambda name, module: name.startswith("layer4"))


def spoil(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Unknown, {}, "does not say what it is; name it: network='torchvision:NAME' or 'timm:NAME'"),
        (Unknown, {"network": "mine.py:make", "class_names": NAMES}, "somebody's own code, which a folder of weights"),
        (Unknown, {"network": "torchvision:resnet18", "class_names": NAMES}, "cannot be built again"),
        (attach_twice, {}, "gates of several calls, and a folder describes one"),
        (attach_by_function, {}, "where= was given as a function"),
        (lambda: ecanet.create_model("resnet8"), {"class_names": NAMES}, "tensors differ, first 'fc."),
        (lambda: ecanet.create_model("resnet8", num_classes=3, in_channels=1), {"class_names": NAMES}, "1 channel,"),
        (lambda: ecanet.create_model("resnet8", features_only=True), {"class_names": NAMES}, "cannot be built again"),
        (lambda: spoil(ecanet.create_model("resnet8", num_classes=3)), {"class_names": NAMES}, "NaN or infinity"),
        (lambda: ecanet.create_model("resnet8", attention=lambda c: ecanet.ECA(c)), {}, "attention= was given as"),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_refused_and_nothing_is_written(make, settings, message, tmp_path):
    folder = tmp_path / "net"
    with pytest.raises(EcanetError, match=re.escape(message)) as caught:
        ecanet.save_pretrained(make(), folder, **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_folder_stays_when_saving_fails(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "net")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="NaN"):
        ecanet.save_pretrained(spoil(ecanet.create_model("resnet8", num_classes=3)), folder, class_names=NAMES)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: cannot be written"):
        ecanet.save_pretrained(ecanet.create_model("resnet8", num_classes=3), tmp_path / "file", class_names=NAMES)


# hostile folders


def change(key: str, value: object) -> Any:
    """Return a function that sets an entry of config.json by its dotted path; ... removes it."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        *groups, last = key.split("/")
        inner = content
        for group in groups:
            inner = inner[group]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(content))

    return edit


def write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def retensor(**changes: object) -> Any:
    """Return a function that changes tensors by name: None removes one."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors: dict[str, Any] = {**load_file(path), **{key.replace("__", "."): v for key, v in changes.items()}}
        save_file({key: value for key, value in tensors.items() if value is not None}, path)

    return edit


BROKEN = {
    "another library's": (change("library", "timm"), "library must be 'ecanet'"),
    "no network": (change("network", ...), "network"),
    "network is text": (change("network", "resnet8"), "network must be a group of settings"),
    "a name of code": (change("network/name", "evil.py:make"), "somebody's own code"),
    "a name that leads out": (change("network/name", "../../resnet8"), "unknown model"),
    "another hub": (change("network/name", "timm:hf-hub:evil/net"), "unknown library"),
    "unknown attention": (change("network/attention", "evil"), "unknown attention 'evil'"),
    "attention that is code": (change("network/attention", "antigravity.Evil"), "code that nobody has named"),
    "weights elsewhere": (change("network/weights", "/etc/passwd"), "network.weights must be null"),
    "an unknown key": (change("auto_map", {"a": "b"}), "auto_map is not a setting"),
    "an unknown option": (change("network/options", {"pretrained": True}), "cannot be built"),
    "another network": (change("network/name", "resnet14"), "tensors differ"),
    "a huge network": (change("network", {"name": "resnet152"}), "cannot hold them"),
    "a million classes": (change("class_names", ["x"] * 100_000), "100,000 classes"),
    "too many classes": (change("class_names", ["x"] * 200_000), "at most 131,072"),
    "no classes": (change("class_names", []), "must have a name for each class"),
    "numbers for names": (change("class_names", [1, 2, 3]), "class_names must be a list of texts"),
    "one class more": (change("class_names", [*NAMES, "d"]), "tensors differ, first 'fc."),
    "huge images": (change("preprocessing/size", 10**9), "preprocessing.size must be at most 4096"),
    "no number": (change("preprocessing/size", "big"), "preprocessing.size must be an integer"),
    "two means": (change("preprocessing/mean", [0, 0]), "3 channels, 2 means"),
    "a deviation of 0": (change("preprocessing/std", [0, 1, 1]), "std must be at least"),
    "BGR": (change("colour_order", "BGR"), "colour_order must be"),
    "grey": (change("colour_order", "grey"), "colour_order of 3 channels is 'RGB'"),
    "an unknown resize": (change("preprocessing/interpolation", "magic"), "interpolation must be"),
    "a dtype": (change("dtype", "int8"), "dtype must be"),
    "a false dtype": (change("dtype", "float16"), "is float32, but config.json says float16"),
    "a wider dtype": (change("dtype", "float64"), "is float32, but config.json says float64"),
    "a gate more": (change("sites/layer9.eca", {"attention": "ECA"}), "do not agree about 1 gates, first 'layer9.eca'"),
    "a gate less": (change("sites/layer1.0.eca", ...), "do not agree about 1 gates, first 'layer1.0.eca'"),
    "another gain": (change("sites/layer1.0.eca/gain", 2.0), "do not agree about 1 gates"),
    "another kernel": (change("sites/layer1.0.eca/kernel_size", 5), "do not agree about 1 gates"),
    "no JSON": (write("config.json", b"\x80\x04."), "config.json: not what"),
    "deep JSON": (write("config.json", b"[" * 10**6), "config.json: not what"),
    "a long JSON": (write("config.json", b" " * (2**23 + 1)), "more than 8,388,608 bytes"),
    "a list": (write("config.json", b"[]"), "must be a group of settings"),
    "an empty file": (write("config.json", b""), "config.json: not what"),
    "infinity": (write("config.json", b'{"library": "ecanet", "dtype": Infinity}'), "config.json: not what"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "half the weights": (cut, "model.safetensors is truncated or not a checkpoint"),
    "a pickle": (write("model.safetensors", b"cos\nsystem\n(S'true'\ntR."), "truncated or not a checkpoint"),
    "a tensor less": (retensor(fc__bias=None), "1 tensors differ, first 'fc.bias'"),
    "a tensor more": (retensor(extra=torch.zeros(2)), "1 tensors differ, first 'extra'"),
    "another shape": (retensor(fc__bias=torch.zeros(4)), "1 tensors differ, first 'fc.bias'"),
    "NaN": (retensor(fc__bias=torch.full((3,), float("nan"))), "NaN or infinity, first 'fc.bias'"),
    "no description": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_hostile_folder_is_refused_in_one_line(kind, saved, tmp_path):
    edit, message = BROKEN[kind]
    folder = shutil.copytree(saved, tmp_path / "net")
    edit(folder)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        ecanet.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert time.monotonic() - began < 20


def test_a_folder_of_something_else_and_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape("config.json is missing")):
        ecanet.from_pretrained(tmp_path)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(CheckpointError, match=re.escape("weights.pth")):
        ecanet.from_pretrained(tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="leave it out"):
        ecanet.from_pretrained(tmp_path, revision="main")


def test_what_a_network_remembers_is_forgotten_with_its_gates():
    model = ecanet.create_model("resnet8", attention="none")
    before = copy.deepcopy(vars(model)["_origin"])
    ecanet.detach(ecanet.attach(model))
    assert vars(model)["_origin"] == before
    other = torchvision.models.squeezenet1_1()
    ecanet.detach(ecanet.attach(other))
    assert "_origin" not in vars(other)
