"""The commands that train and use a network work, and each mistake is one line and exit code 2."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from ecanet.report.figures import to_png
from tiny_runs import add_tiny


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Train on digits for three epochs with the command line; return the run directory."""
    from ecanet.__main__ import main

    folder = tmp_path_factory.mktemp("runs") / "digits"
    command = ["ecanet", "train", "quickstart", "--model", "resnet8"]
    command += ["--epochs", "3", "--device", "cpu", "--out", str(folder)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0, err.getvalue()
    # The output is short: network, batch, run directory, a line per epoch, the result, the report, what to try next.
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [
        "resnet8",
        "batch",
        "folder",
        *["epoch"] * 3,
        lines[6].split()[0],
        "report",
        "try",
    ]
    assert "batch 64 = 64 images × 1 device (cpu) × 1 accumulated; learning rate 0.1 (0.1 for 64)" in lines
    assert "images/s" in lines[3]
    assert err.getvalue() == ""
    return folder


# commands that succeed


def test_eval_of_a_run(ecanet, digits_run):
    history = json.loads((digits_run / "metrics.json").read_text())["history"]
    code, out, _ = ecanet("eval", digits_run, "--json", "--device", "cpu")
    assert code == 0
    assert json.loads(out)["top1"] == pytest.approx(max(row["top1"] for row in history))
    code, out, _ = ecanet("eval", digits_run, "--device", "cpu")
    assert (code, out.count("\n")) == (0, 1)
    assert "top1" in out


def test_train_prints_its_results_as_json_alone(ecanet, monkeypatch):
    add_tiny(monkeypatch)
    options = ["--model", "resnet8", "--epochs", 1, "--device", "cpu", "--set", "data.name=tiny"]
    code, out, err = ecanet("train", "quickstart", *options, "--out", "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    written = json.loads(Path("run/metrics.json").read_text())
    assert result == {"folder": "run", **written}
    assert "epoch 1/1" in err
    assert "report run/report.html" in err


def test_predict_of_a_folder_and_of_files(ecanet, digits_run):
    code, out, _ = ecanet("predict", digits_run, digits_run / "examples", "--json", "--top", 3)
    assert code == 0
    rows = json.loads(out)
    files = sorted((digits_run / "examples").iterdir())
    assert [row["path"] for row in rows] == [str(file) for file in files]
    assert {len(row["classes"]) for row in rows} == {3}
    # The files are called NN-DIGIT.png; after three epochs the network classifies about four of five correctly.
    correct = sum(row["classes"][0]["name"] == Path(row["path"]).stem.split("-")[1] for row in rows)
    assert correct >= 12
    code, out, _ = ecanet("predict", digits_run / "checkpoints" / "last.ckpt", files[0])
    assert code == 0
    assert "%" in out
    assert len([line for line in out.splitlines() if files[0].name in line or "%" in line]) >= 1


def test_a_table_shows_every_name_whole(ecanet, digits_run, tmp_path, monkeypatch):
    """A terminal of 80 columns has room for a gate's name; an image's long path takes several lines."""
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "a folder with a name of some length" / "and one inside" / "the image that is meant.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(sorted((digits_run / "examples").iterdir())[0].read_bytes())
    _, out, _ = ecanet("predict", digits_run, path)
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == str(path).replace(" ", "")
    _, out, _ = ecanet("inspect", digits_run, "--out", tmp_path / "inspect")
    assert "│ layer1.0.eca │" in out


def test_predict_stops_at_a_broken_image_or_skips_it(ecanet, digits_run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = tmp_path / "good.png"
    good.write_bytes(to_png(torch.zeros(3, 20, 30, dtype=torch.uint8)))
    code, out, err = ecanet("predict", digits_run, broken, good, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"ecanet: {broken}: cannot be read as an image")
    assert err.count("\n") == 1
    code, out, err = ecanet("predict", digits_run, broken, good, "--json", "--on-corrupt", "skip")
    assert code == 0
    assert [row["path"] for row in json.loads(out)] == [str(good)]
    assert err.startswith(f"skipped: {broken}")


def test_resuming_a_finished_run_changes_nothing(ecanet, digits_run):
    before = json.loads((digits_run / "metrics.json").read_text())
    code, out, _ = ecanet("train", "--resume", digits_run, "--device", "cpu")
    assert code == 0
    assert "report" in out
    assert json.loads((digits_run / "metrics.json").read_text())["history"] == before["history"]


def test_models_counts_parameters(ecanet):
    code, out, _ = ecanet("models", "--json")
    assert code == 0
    counts = {(row["model"], row["attention"]): row["parameters"] for row in json.loads(out)}
    # torchvision's count, and the gates': 86 by Eq. 12, 80 in the released network
    assert counts["resnet50", "none"] == 25_557_032
    assert counts["resnet50", "eca"] == 25_557_032 + 86
    for sizes, added in (("official", 80), ("3333", 48)):
        code, out, _ = ecanet("models", "resnet50", "--attention", "eca", "--kernel-sizes", sizes)
        assert code == 0
        assert f"{25_557_032 + added:,}" in out


def test_models_shows_the_attentions_that_fit_and_says_why_others_do_not(ecanet):
    code, out, _ = ecanet("models", "mobilenet_v2", "--json")
    assert code == 0
    rows = {row["attention"]: row for row in json.loads(out)}
    assert rows["none"]["parameters"] == 3_504_872  # torchvision's count
    assert rows["se"]["parameters"] > rows["none"]["parameters"]
    assert rows["a2"] | {"note": ""} == {"model": "mobilenet_v2", "attention": "a2", "parameters": None, "note": ""}
    assert "ResNets only" in rows["a2"]["note"]
    code, out, err = ecanet("models", "mobilenet_v2", "--attention", "a2")
    assert (code, out) == (2, "")
    assert "ResNets only" in err


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_models_takes_other_libraries_networks(ecanet, name):
    code, out, _ = ecanet("models", name, "--json")
    assert code == 0
    assert [(row["model"], row["parameters"]) for row in json.loads(out)] == [(name, 11_689_512)]
    code, out, _ = ecanet("models", name, "--attach", "eca", "--json")
    assert code == 0
    assert len(json.loads(out)["sites"]) == 8


def test_settings_reach_the_recipe(ecanet, tmp_path, monkeypatch):
    add_tiny(monkeypatch)
    options = [
        "--model",
        "resnet14",
        "--attention",
        "se",
        "--kernel-sizes",
        "adaptive",
        "--batch-size",
        20,
        "--seed",
        9,
    ]
    options += ["--learning-rate", 0.5, "--set", "data.flip=true", "--set", "model.options.reduction=4", "--epochs", 1]
    options += ["--set", "data.name=tiny"]
    code, *_ = ecanet("train", "digits", *options, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["model"] == {
        "name": "resnet14", "attention": "se", "kernel_sizes": "adaptive", "where": None, "replace": None,
        "preserve": None, "weights": None, "options": {"reduction": 4},
    }  # fmt: skip
    assert (recipe["data"]["batch_size"], recipe["data"]["flip"], recipe["seed"]) == (20, True, 9)
    assert (recipe["optimizer"]["learning_rate"], recipe["epochs"]) == (0.5, 1)
    # The recipe warms up for 2 of 12 epochs, which shrinks with the number of epochs.
    assert recipe["schedule"]["warmup_epochs"] == pytest.approx(2 / 12)


# mistakes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train quickstart --epochs -1", "epochs must be at least 1, got -1"),
        ("train quickstart --epochs three", "Invalid value for '--epochs'"),
        ("train quickstart --epoch 3", "No such option: --epoch .*--epochs"),
        ("trian quickstart", "No such command 'trian'. Did you mean 'train'"),
        ("train", "give a recipe or a data set, such as `ecanet train quickstart`"),
        ("train quickstat", "no recipe or data called 'quickstat'; did you mean 'quickstart'"),
        ("train digits --model resnet51", "unknown model 'resnet51'"),
        ("train digits --attention ecaa", "unknown attention 'ecaa'"),
        ("train digits --kernel-sizes 3,x", "kernel sizes '3,x' are not"),
        ("train digits --set data.batchsize=3", "data.batchsize is not a setting; did you mean 'batch_size'"),
        ("train digits --set epochs", "--set epochs: expected KEY=VALUE"),
        ("train digits --device banana", "unknown device 'banana'; write auto, cpu, cuda, cuda:N or mps"),
        ("train digits --device gpu", "unknown device 'gpu'; write auto, cpu, cuda, cuda:N or mps"),
        ("train folder:nowhere", "nowhere: no such folder"),
        ("train fashion-mnist --data-dir nowhere", "nowhere: no such folder"),
        ("train --resume nowhere", "nowhere: no run to resume here"),
        ("train digits --resume nowhere", "--resume takes everything from the run"),
        ("eval nowhere.ckpt", "no checkpoint at nowhere.ckpt"),
        ("eval", "give a checkpoint or a run, or --model and --weights"),
        ("predict nowhere.ckpt nothing.png", "nothing.png: no such file or folder"),
        ("predict", "Missing argument"),
        ("push --folder", r"requires an argument \(see ecanet push --help\)"),
        ("models resnet8 --attach", r"requires an argument \(see ecanet models --help\)"),
        ("models resnet51", "unknown model 'resnet51'"),
    ],
)
def test_a_mistake_is_one_line(ecanet, tmp_path, command, message):
    import re

    code, out, err = ecanet(*command.split())
    assert code == 2
    assert out == ""
    assert err.startswith("ecanet: ")
    assert err.count("\n") == 1
    assert re.search(message, err, re.IGNORECASE), err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_class_folder_is_one_line(ecanet, tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(to_png(torch.zeros(3, 9, 9, dtype=torch.uint8)))
    (tmp_path / "train" / "dog" / "0.png").unlink()
    code, _, err = ecanet("train", f"folder:{tmp_path}")
    assert code == 2
    assert "train/dog: no images in this class folder" in err
    assert err.count("\n") == 1


def test_a_corrupt_image_in_training_is_one_line_or_skipped(ecanet, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for at in range(6):
                image = torch.randint(0, 256, (3, 24, 24), generator=generator, dtype=torch.uint8)
                (tmp_path / "photos" / part / name / f"{at}.png").write_bytes(to_png(image))
    victim = tmp_path / "photos" / "train" / "cat" / "2.png"
    victim.write_bytes(victim.read_bytes()[:700])
    command = ["train", f"folder:{tmp_path / 'photos'}", "--model", "resnet8", "--epochs", 1, "--batch-size", 4]
    command += ["--device", "cpu", "--set", "data.image_size=16", "--set", "data.workers=1"]
    command += ["--weights", "none"]
    code, _, err = ecanet(*command, "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith(f"ecanet: {victim}: cannot be read as an image")
    assert err.count("\n") == 1
    code, _, err = ecanet(*command, "--out", tmp_path / "again", "--set", "data.on_corrupt=skip")
    assert code == 0
    assert err.splitlines() == [f"skipped: {victim}: cannot be read as an image (image file is truncated)"]


class _Trap:
    """A pickle that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_that_are_broken_or_would_run_code_are_one_line(ecanet, tmp_path, digits_run):
    whole = (digits_run / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": _Trap(tmp_path / "created")}, tmp_path / "trap.ckpt")
    for name, message in (("cut", "truncated"), ("text", "not"), ("trap", "may run code")):
        for command in (("eval",), ("predict",)):
            more = [digits_run / "examples"] if command == ("predict",) else []
            code, out, err = ecanet(*command, tmp_path / f"{name}.ckpt", *more)
            assert (code, out) == (2, "")
            assert f"{name}.ckpt" in err
            assert message in err
            assert err.count("\n") == 1
    assert not (tmp_path / "created").exists()
    # The pickle does run code if it is trusted, so the assertion above can fail.
    torch.load(tmp_path / "trap.ckpt", weights_only=False)
    assert (tmp_path / "created").exists()
