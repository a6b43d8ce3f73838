"""`ecanet slim`: folds gates of a run, writes a report and weights, and reads folders of images without labels."""

import json
import resource

import pytest
import torch
from typer.testing import CliRunner

from ecanet import deploy, training
from ecanet.attention import ECA
from ecanet.cli import app
from ecanet.errors import ConfigError, DataError
from photographs import paint
from tiny_runs import TINY, add_tiny, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one epoch on tiny images, which are known while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        add_tiny(patch)
        folder = tmp_path_factory.mktemp("slim") / "run"
        recipe = TINY.but(epochs=1, model=TINY.model.but(name="resnet8"))
        run(recipe, folder, loggers="none")
        yield folder


def slim(*arguments):
    return CliRunner().invoke(app, ["slim", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("finetune", [0, 0.7])
def test_a_run_without_its_gates_is_written_and_read(made, tmp_path, finetune):
    out = tmp_path / "out"
    done = slim(made, "--budget", 0.95, "--out", out, "--finetune", finetune)
    assert done.exit_code == 0, done.output
    assert "folded 3 of 3 gates" in done.output
    report = json.loads((out / "slim.json").read_text())
    assert report["folded"] == 3
    assert (report["fitted"], report["judged"]["images"]) == (48, 20)  # all training images, all held-out ones
    assert set(report["top1"]) == {"before", "folded", *(["fine-tuned"] if finetune else [])}
    task, first = training.restore(out / "slim.pth"), training.restore(made)
    gates = [module for module in task.model.modules() if isinstance(module, ECA)]
    assert [(gate.gain, float(gate.conv.weight.detach().abs().max())) for gate in gates] == [(2, 0)] * 3  # neutral
    data = training.build_data(task.recipe, train=False)
    (batch, *_) = data.val_dataloader()
    x, _ = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    changed = (task(x) - first(x)).abs().max()
    assert changed > 0
    top1 = training.evaluate(out / "slim.pth", device="cpu")["top1"]
    assert top1 == pytest.approx(report["top1"]["fine-tuned" if finetune else "folded"])


def test_fine_tuning_lowers_the_loss(made):
    task = training.restore(made)
    data = training.build_data(task.recipe)
    (batch, *_) = data.train_dataloader()
    x, labels = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    with torch.no_grad():
        before = task.loss(task(x), labels)
    assert training.fine_tune(task, 10, device=torch.device("cpu")) == 30
    assert not task.training
    with torch.no_grad():
        assert task.loss(task(x), labels) < before
    with pytest.raises(ConfigError, match="fine-tuning takes a positive number of epochs, such as 0.2, got -1"):
        training.fine_tune(task, -1, device=torch.device("cpu"))


def test_folders_of_images_without_labels_judge(made, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(9):
            paint(tmp_path / name / "deep" / f"{number}.png", 17 * number)
    done = slim(
        made, "--budget", 0.9, "--images", tmp_path / "here", "--also", f"folder:{tmp_path / 'there'}", "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["fitted"] == 5
    assert [share["images"] for share in report["also"].values()] == [9]


def test_without_training_images_half_of_the_others_fit(made, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise DataError("they are gone")

    monkeypatch.setattr(training, "sample_images", refuse)
    done = slim(made, "--budget", 0.95, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["fitted"], report["judged"]["images"]) == (10, 10)
    assert "no training images (they are gone): half of the held-out images fit" in done.stderr


def test_constants_are_fitted_to_training_images(made, tmp_path, monkeypatch):
    seen = []
    slim_of_package = deploy.slim

    def watch(model, images, **options):
        seen.append((images, options["fit_images"]))
        return slim_of_package(model, images, **options)

    monkeypatch.setattr(deploy, "slim", watch)
    assert slim(made, "--budget", 0.95, "--out", tmp_path).exit_code == 0
    ((judging, fitting),) = seen
    task = training.restore(made)
    data = training.build_data(task.recipe)
    held_out = {one.numpy().tobytes() for batch in judging for one in batch}
    assert len(held_out) == 20
    assert held_out.isdisjoint(one.numpy().tobytes() for one in fitting)
    assert torch.equal(fitting, training.sample_images(data, 48, train=True)[0])


def test_mistakes_are_one_line(made, tmp_path):
    for arguments in ((made, "--budget", 2), (tmp_path / "nothing",), (made, "--images", tmp_path / "none")):
        done = slim(*arguments, "--out", tmp_path / "out")
        assert done.exit_code != 0
        assert "\n" not in str(done.exception)
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_the_old_report_stays(made, tmp_path):
    (tmp_path / "slim.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        done = slim(made, "--budget", 0.95, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(done.exception, ConfigError)
    assert "cannot be written (File too large)" in str(done.exception)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("slim.json", "old")]


@pytest.mark.parametrize("name", ["slim.json", "slim.pth"])
def test_a_folder_in_a_files_place_is_one_line(made, tmp_path, name):
    (tmp_path / name).mkdir()
    done = slim(made, "--budget", 0.95, "--out", tmp_path)
    assert isinstance(done.exception, ConfigError)
    assert "cannot be written (Is a directory)" in str(done.exception)
