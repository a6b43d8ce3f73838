"""Where `save_pretrained` writes: not over the files of something else, and not where there is no folder."""

import json

import pytest
import torch

import ecanet
from ecanet.errors import ConfigError

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ecanet.create_model("resnet8", num_classes=4).eval()


OTHERS = {
    "a project's page": {"README.md": "# My project, written by me"},
    "another library's network": {"config.json": json.dumps({"model_type": "bert"}), "model.safetensors": "x"},
    "a list": {"config.json": "[]"},
    "no text": {"config.json": "\0\ud800"},
    "weights alone": {"model.safetensors": "x"},
    "a picture": {"gates.png": "x"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_something_else_are_not_replaced(model, kind, tmp_path):
    for name, content in OTHERS[kind].items():
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="of something else, which would be replaced; give another folder") as caught:
        ecanet.save_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_files_in_the_folder_stay(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ecanet.save_pretrained(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_ours_is_written_again(model, tmp_path):
    ecanet.save_pretrained(model, tmp_path)
    ecanet.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()  # it is written last
    ecanet.save_pretrained(model, tmp_path)
    ecanet.from_pretrained(tmp_path)


@pytest.mark.parametrize("folder", [None, 3, "", "a\0b", "\udc80", b"folder"])
def test_a_name_of_no_folder_is_one_line(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="folder must be the name of a folder, got "):
        ecanet.save_pretrained(model, folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [None, 3, "a\0b", "\udc80"])
def test_a_source_that_is_no_name_is_one_line(source):
    with pytest.raises(ConfigError, match="source must be a folder or the name of a repository, got "):
        ecanet.from_pretrained(source)
