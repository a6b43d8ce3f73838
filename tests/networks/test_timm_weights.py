"""timm's default weights: one question to the hub, its cache without a connection, and one quick line without both."""

import time

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ecanet import networks
from ecanet.errors import CheckpointError

NAME = "timm:resnet10t"


class Hub:
    """Stands for the hub's client: it answers, or raises what a missing connection raises."""

    def __init__(self, problem=None):
        self.problem, self.asked = problem, []

    def head(self, url, *, timeout):
        self.asked.append((url, timeout))
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Return a function that sets how the hub answers; its cache is an empty folder, and no download is tried."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def answer(problem=None):
        hub = Hub(problem)
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: hub)
        return hub.asked

    return answer


def keep(folder, model, file="model.safetensors", **names):
    """Put the weights of ``model`` where the hub's client keeps what it has downloaded."""
    repository = folder / "hub" / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path = repository / "snapshots" / "abc" / file
    save_file(state, path) if file.endswith(".safetensors") else torch.save(state, path)


PROBLEMS = [OSError("no route to host"), TimeoutError("timed out"), RuntimeError("offline mode is enabled")]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_without_a_connection_one_quick_line_says_what_to_download(asked, problem):
    questions, model = asked(problem), networks.find(NAME)
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        networks.load_weights(model, NAME, "default")
    assert time.perf_counter() - started < 5  # the client's own retries take most of a minute
    assert questions == [(constants.ENDPOINT, 5)]
    assert str(caught.value) == (
        f"cannot get timm's weights for 'resnet10t' ({constants.ENDPOINT} does not answer: {problem}); download "
        f"model.safetensors of timm/resnet10t.c3_in1k by other means and pass the file's path instead of default"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_without_a_connection_the_cache_serves(asked, tmp_path, file):
    asked(OSError("no route to host"))
    torch.manual_seed(1)
    kept, model = networks.find(NAME), networks.find(NAME)
    keep(tmp_path, kept, file)
    report = networks.load_weights(model, NAME, "default")
    assert not report.missing
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        ("special.bin", "special.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("one.safetensors", "one.safetensors"),
    ],
)
def test_other_weights_of_the_same_repository_are_left_alone(asked, tmp_path, named, kept):
    """A repository may hold several networks' files; only the one that timm names, or its safetensors form, serves."""
    asked(OSError("no route to host"))
    model = networks.find(NAME)
    model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_filename": named}
    keep(tmp_path, networks.find(NAME))
    with pytest.raises(CheckpointError, match=f"download {named} of timm/"):
        networks.load_weights(model, NAME, "default")
    folder = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k" / "snapshots" / "abc"
    (folder / "model.safetensors").rename(folder / kept)
    assert not networks.load_weights(model, NAME, "default").missing


def test_with_a_connection_timm_downloads_as_ever(asked, monkeypatch, tmp_path):
    """The cache's file is not taken then: it may be old."""
    questions, given, model = asked(), [], networks.find(NAME)
    keep(tmp_path, networks.find(NAME))

    def create(name, **options):
        given.append((name, options))
        return model

    monkeypatch.setattr(timm, "create_model", create)
    networks.load_weights(model, NAME, "default")
    assert given == [("resnet10t", {"pretrained": True, "pretrained_cfg_overlay": {}})]
    assert len(questions) == 1


def test_weights_that_are_not_on_the_hub_ask_nothing(asked, monkeypatch):
    questions, model = asked(OSError("no route to host")), networks.find(NAME)
    model.pretrained_cfg = {"url": "https://example.com/weights.pth"}
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: model)
    networks.load_weights(model, NAME, "default")
    assert questions == []
