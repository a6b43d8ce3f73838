"""A run for others: its card says what the run has measured, and the commands take its folder as they take the run."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import constants

import fake_hub
import tiny_runs
from ecanet.errors import ConfigError, DataError
from ecanet.studies.publishing import publish
from ecanet.training import evaluate, restore


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with other seeds, and one of another recipe, side by side."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.add_tiny(patch)
        for name, recipe in {
            "a": tiny_runs.TINY.but(epochs=2),
            "b": tiny_runs.TINY.but(epochs=2, seed=1),
            "other": tiny_runs.TINY.but(epochs=1),
        }.items():
            tiny_runs.run(recipe, root / name)
        yield root


def read_card(folder):
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_was_measured(runs, tmp_path):
    publish(runs / "a", tmp_path / "net", which="last")
    metadata, text = read_card(tmp_path / "net")
    report, other = (json.loads((runs / name / "metrics.json").read_text()) for name in "ab")
    top1, second = report["metrics"]["top1"], other["metrics"]["top1"]
    result = metadata["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["metrics"][0]["type"]) == ("tiny", "accuracy")
    assert result["metrics"][0]["value"] == pytest.approx(top1, abs=0.005)
    mean, half = (top1 + second) / 2, 12.706 * abs(top1 - second) / 2  # t of one degree of freedom
    row = re.search(r"\| top-1, % \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \(2 seeds\) \|", text)
    assert [float(x) for x in row.groups()] == pytest.approx([top1, mean, half], abs=0.01)
    assert f"{report['parameters']:,}, 9 of them in gates" in text
    assert "of epoch 2 of 2. Random seed 0." in text
    assert "## Gates" not in text
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])["epochs"] == 2
    # One seed has no interval; and the best epoch was chosen on the images that measure it.
    publish(runs / "other", tmp_path / "one")
    _, text = read_card(tmp_path / "one")
    assert "±" not in text
    assert "interval" not in text
    assert "the epoch was chosen on the same held-out images" in text


def test_a_picture_of_the_gates_goes_along(runs, tmp_path):
    run = shutil.copytree(runs / "other", tmp_path / "run")
    (run / "inspect").mkdir()
    (run / "inspect" / "classes.png").write_bytes(b"picture")
    publish(run, tmp_path / "net")
    assert (tmp_path / "net" / "gates.png").read_bytes() == b"picture"
    assert "![The weights of the gates](gates.png)" in read_card(tmp_path / "net")[1]
    publish(runs / "other", tmp_path / "net")
    assert not (tmp_path / "net" / "gates.png").exists()


def test_the_commands_take_the_folder_as_a_run(runs, tmp_path, ecanet):
    code, out, err = ecanet("push", runs / "a", "--folder", tmp_path / "net")
    assert (code, out) == (0, f"resnet8 with eca: 3 gates, 3 classes\nfolder {tmp_path / 'net'}\n"), err
    code, out, err = ecanet("push", runs / "a", "--folder", tmp_path / "net", "--json")
    expected = {"network": "resnet8", "attention": "eca", "gates": 3, "classes": 3, "folder": str(tmp_path / "net")}
    assert (code, json.loads(out)) == (0, expected), err
    assert evaluate(tmp_path / "net", device="cpu") == evaluate(runs / "a", device="cpu")
    task, before = restore(tmp_path / "net"), restore(runs / "a")
    assert (task.spec, task.recipe) == (before.spec, before.recipe)
    assert tiny_runs.equal(task.model.state_dict(), before.model.state_dict())
    image = tmp_path / "image.png"
    from PIL import Image

    Image.new("L", (8, 8), 90).save(image)
    answers = [
        ecanet("predict", source, image, "--device", "cpu", "--json") for source in (runs / "a", tmp_path / "net")
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0


def test_a_folder_that_no_run_wrote_asks_for_its_data(runs, tmp_path):
    from ecanet import save_pretrained
    from ecanet.networks import Preprocessing

    task = restore(runs / "a")
    made_for = Preprocessing(channels=1, size=8, mean=(0.4,), std=(0.3,), crop=1.0)
    save_pretrained(task.model, tmp_path / "net", class_names=("dark", "grey", "light"), preprocessing=made_for)
    with pytest.raises(ConfigError, match="do not say what they were trained on: give the data set with --data"):
        evaluate(tmp_path / "net", device="cpu")
    assert evaluate(tmp_path / "net", data_name="tiny", device="cpu") == evaluate(runs / "a", device="cpu")
    # It is normalized as the folder says, not as the data set does.
    made_for = made_for.but(mean=(0.9,))
    save_pretrained(task.model, tmp_path / "net", class_names=("dark", "grey", "light"), preprocessing=made_for)
    other = evaluate(tmp_path / "net", data_name="tiny", device="cpu")
    assert other["val_loss"] != evaluate(runs / "a", device="cpu")["val_loss"]
    with pytest.raises(DataError, match="has 10 classes and the network 3"):
        evaluate(tmp_path / "net", data_name="digits", device="cpu")


def test_paths_of_this_machine_are_not_published(runs, tmp_path):
    run = shutil.copytree(runs / "other", tmp_path / "run")
    for name in ("metrics.json", "recipe.json"):
        text = (run / name).read_text()
        assert '"root": null' in text
        (run / name).write_text(text.replace('"root": null', '"root": "/home/me/private"'))
    import torch

    best = run / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    content["ecanet"]["recipe"]["data"] |= {"root": "/home/me/private"}
    torch.save(content, best)
    publish(run, tmp_path / "net")
    assert not any(b"/home/me" in path.read_bytes() for path in (tmp_path / "net").iterdir())


def test_push_uploads(runs, tmp_path, ecanet, monkeypatch):
    with fake_hub.serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        code, out, err = ecanet("push", runs / "other", "me/tiny", "--private")
        assert (code, out.splitlines()[-1]) == (0, f"{hub.address}/me/tiny/commit/{fake_hub.COMMIT}"), err
        code, out, err = ecanet("push", runs / "other", "me/tiny", "--json")
        assert (code, json.loads(out)["commit"]) == (0, f"{hub.address}/me/tiny/commit/{fake_hub.COMMIT}"), err
        ecanet("push", runs / "other", "--folder", tmp_path / "net")
        code, again, err = ecanet("push", tmp_path / "net", "me/tiny", "--json")
        assert (code, json.loads(again)) == (0, {"commit": json.loads(out)["commit"]}), err
        assert set(hub.repos["me/tiny"]) == {"README.md", "config.json", "model.safetensors"}
        assert hub.made[0]["visibility"] == "private"


def test_mistakes_are_one_line(runs, tmp_path, ecanet):
    ecanet("push", runs / "other", "--folder", tmp_path / "net")
    (tmp_path / "file").touch()
    for arguments, message in [
        ([runs / "a"], "give a repository (OWNER/NAME), or --folder to write the files only"),
        ([tmp_path / "none", "me/net"], "no run here"),
        ([runs / "a", "me/net", "--which", "middle"], "must be best or last, got 'middle'"),
        ([runs / "a", "--folder", tmp_path / "file"], "file is a file; give a directory"),
        ([tmp_path / "net", "--folder", tmp_path / "other"], "is such a folder already; give a repository"),
        ([runs / "a", "me"], "'me' is no repository: give OWNER/NAME"),
        ([tmp_path / "none", "me"], "'me' is no repository: give OWNER/NAME"),
    ]:
        code, _, err = ecanet("push", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
