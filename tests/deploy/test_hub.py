"""The Hugging Face Hub, played by a server on the loopback address: what goes there comes back; errors are one line."""

import json
import re

import pytest
import torch

import ecanet
import fake_hub
from ecanet.errors import CheckpointError, ConfigError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.serve() as server:
        fake_hub.answer_for_the_hub(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def model():
    net = ecanet.create_model("resnet8", num_classes=2)
    with torch.no_grad():
        net.layer1[0].eca.conv.weight.fill_(0.7)
    return net.eval()


def test_what_is_pushed_comes_back(hub, model, tmp_path):
    address = ecanet.push_to_hub(model, "me/net", token=fake_hub.TOKEN, private=True, class_names=["no", "yes"])
    assert address == f"{hub.address}/me/net/commit/{fake_hub.COMMIT}"
    assert set(hub.repos["me/net"]) == {"README.md", "config.json", "model.safetensors"}
    assert hub.made == [{"name": "net", "organization": "me", "visibility": "private"}]
    hub.repos["me/net"]["evil.py"] = b"raise SystemExit"
    hub.repos["me/net"]["pytorch_model.bin"] = b"a pickle"
    loaded = ecanet.from_pretrained("me/net")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.pretrained_config.class_names == ("no", "yes")
    fetched = {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET") and "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}
    assert type(ecanet.from_pretrained("me/net", revision=fake_hub.COMMIT)) is type(model)
    # A saved folder is uploaded as it is, without files that do not belong to it.
    ecanet.save_pretrained(model, tmp_path / "net", class_names=["no", "yes"])
    (tmp_path / "net" / "secret.txt").write_text("mine")
    ecanet.push_to_hub(tmp_path / "net", "us/other", token=fake_hub.TOKEN)
    assert set(hub.repos["us/other"]) == {"README.md", "config.json", "model.safetensors"}


def test_private_missing_and_wrong_names_are_one_line(hub, model):
    ecanet.push_to_hub(model, "me/secret", token=fake_hub.TOKEN)
    hub.private.add("me/secret")
    for repo, settings, message in [
        ("me/secret", {"token": False}, "has no such repository, or it is private; log in (hf auth login)"),
        ("me/none", {}, "has no such repository, or it is private"),
        ("me/secret", {"token": fake_hub.TOKEN, "revision": "v9"}, "the repository has no such revision"),
        ("a/b/c", {}, "no such folder, and not the name of a repository (owner/name)"),
        ("../up", {}, "no such folder, and not the name of a repository"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            ecanet.from_pretrained(repo, **settings)
        assert "\n" not in str(caught.value)
    assert type(ecanet.from_pretrained("me/secret", token=fake_hub.TOKEN)) is type(model)
    hub.repos["me/plain"] = {"README.md": b"", "config.json": json.dumps({"architecture": "resnet50"}).encode()}
    with pytest.raises(CheckpointError, match="architecture is not a setting"):
        ecanet.from_pretrained("me/plain")


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_without_the_right_token_nothing_is_pushed(hub, model, token):
    with pytest.raises(ConfigError, match=re.escape("wants to know who you are; log in (hf auth login)")) as caught:
        ecanet.push_to_hub(model, "me/net", token=token)
    assert "\n" not in str(caught.value)
    assert hub.repos == {}


@pytest.mark.parametrize("repo", ["me", "me/net/part", "me/", "me/ne t", "https://huggingface.co/me/net", ""])
def test_what_is_no_repositorys_name_is_refused_before_anything_is_sent(hub, model, repo):
    with pytest.raises(ConfigError, match=re.escape(f"{repo!r} is no repository: give OWNER/NAME")):
        ecanet.push_to_hub(model, repo, token=fake_hub.TOKEN)
    assert hub.asked == []


def test_without_a_connection_the_cache_is_taken(hub, model, monkeypatch, tmp_path):
    ecanet.push_to_hub(model, "me/net", token=fake_hub.TOKEN)
    ecanet.from_pretrained("me/net")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert type(ecanet.from_pretrained("me/net")) is type(model)
    for act in (lambda: ecanet.from_pretrained("me/other"), lambda: ecanet.push_to_hub(model, "me/net", token="hf_x")):
        with pytest.raises((CheckpointError, ConfigError), match=re.escape("127.0.0.1:9 cannot be reached")) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_broken_folder_is_not_pushed(hub, model, tmp_path):
    ecanet.save_pretrained(model, tmp_path / "net")
    weights = tmp_path / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        ecanet.push_to_hub(tmp_path / "net", "me/net", token=fake_hub.TOKEN)
    with pytest.raises(ConfigError, match="class_names: .* is saved already"):
        ecanet.push_to_hub(tmp_path / "net", "me/net", class_names=["a", "b"])
    assert hub.asked == []
