"""Training follows the recipe, resumes exactly after an interruption, and writes complete files."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ecanet.data.sources import SMALL_SETS
from ecanet.errors import CheckpointError, ConfigError, DataError
from ecanet.models import create_model
from ecanet.recipes import RECIPES, DataConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig, to_dict
from ecanet.report import Report
from ecanet.training import checkpoints, read_recipe, restore, trained
from ecanet.training import trainer as train
from ecanet.training.tasks import Classification, build
from tiny_runs import TINY, add_tiny, content, equal, load_tiny, run, weights

ONE = SimpleNamespace(reduce_boolean_decision=bool)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_tiny(monkeypatch)


def task_of(recipe: Recipe) -> Classification:
    torch.manual_seed(0)
    task = build(recipe, SMALL_SETS["tiny"].spec)
    assert isinstance(task, Classification)
    return task


# a run


def test_a_run_learns_and_leaves_its_folder(tmp_path, figures):
    report = run(TINY.but(epochs=8), tmp_path / "run")
    # Guessing gives at most 35 %. The three grey levels are easy to separate.
    assert report.metrics["top1"] >= 90
    assert report.metrics["best_top1"] == max(row["top1"] for row in report.history)
    files = {str(p.relative_to(report.folder)) for p in report.folder.rglob("*") if p.is_file()}
    wanted = {"recipe.json", "environment.json", "metrics.csv", "metrics.json", "report.html"}
    assert wanted | {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    assert any(name.startswith("examples/") for name in files)
    page = (report.folder / "report.html").read_text()
    assert page.count("<svg") >= 5  # three curves, the confusion matrix, the gates
    assert json.loads((report.folder / "recipe.json").read_text()) == to_dict(TINY.but(epochs=8))
    rows = list(csv.DictReader((report.folder / "metrics.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in rows] == [row["top1"] for row in report.history]
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    again = Report.read(report.folder)
    assert (again.metrics, again.history, again.recipe) == (report.metrics, report.history, report.recipe)


def test_top1_and_the_confusion_matrix_are_correct(tmp_path):
    report = run(TINY.but(epochs=1), tmp_path / "run")
    task = restore(report.last_checkpoint)
    images, labels = load_tiny(None, False)
    with torch.inference_mode():
        logits = task(task.spec.normalize(images))
    matrix = [[0] * 3 for _ in range(3)]
    for label, logit in zip(labels.tolist(), logits.tolist(), strict=True):
        matrix[label][logit.index(max(logit))] += 1
    assert report.artifacts["confusion"] == matrix
    assert report.metrics["top1"] == pytest.approx(100 * sum(matrix[i][i] for i in range(3)) / 20)
    # With three classes every image would be in the top five.
    assert "top5" not in report.metrics
    assert report.metrics["macro"] == pytest.approx(100 * sum(matrix[i][i] / sum(matrix[i]) for i in range(3)) / 3)
    assert report.metrics["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    for example in report.artifacts["examples"]:
        at = next(i for i, image in enumerate(images) if torch.equal(image, example["image"]))
        assert (example["label"], example["prediction"]) == (int(labels[at]), int(logits[at].argmax()))


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, second, other = (
        run(TINY.but(epochs=1, seed=seed), tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


def test_a_run_takes_the_name_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", lambda: TINY.but(epochs=1))
    assert train.run("tiny", folder=tmp_path / "run", device="cpu", quiet=True).recipe == TINY.but(epochs=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("quickstat", "no recipe or data called 'quickstat'; did you mean 'quickstart'?"),
        (3, "run needs a recipe or the name of one, such as run('quickstart'), got 3"),
        (None, "run needs a recipe or the name of one, such as run('quickstart'), got None"),
    ],
)
def test_something_else_than_a_recipe_is_refused(tmp_path, wrong, message):
    with pytest.raises(ConfigError) as caught:
        train.run(wrong, folder=tmp_path / "run")
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    report = run(TINY.but(epochs=1), tmp_path / "run")
    before = report.last_checkpoint.read_bytes()
    with pytest.raises(ConfigError, match=f"already holds a run; continue it .--resume {report.folder}"):
        run(TINY.but(epochs=1), report.folder)
    assert report.last_checkpoint.read_bytes() == before


def test_a_run_with_a_mistake_makes_no_folder(tmp_path):
    with pytest.raises(DataError):
        run(TINY.but(data=DataConfig(name=f"folder:{tmp_path / 'nowhere'}")), tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown model"):
        run(TINY.but(model=ModelConfig(name="resnet21")), tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown task 'clasification'; did you mean 'classification'"):
        run(TINY.but(task="clasification"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(ConfigError, match="not finite in epoch 1, batch 2: training image"):
        run(
            TINY.but(optimizer=OptimizerConfig(learning_rate=1e30, base_batch=16), schedule=ScheduleConfig()),
            tmp_path / "r",
        )


# settings


def test_effective_batch_learning_rate_and_steps(tmp_path):
    seen = []
    original = Classification.on_train_batch_end

    def watch(self: Any, *args: Any) -> None:
        seen.append(
            (self.global_step, self.effective_batch, self.learning_rate, self.optimizers().param_groups[0]["lr"])
        )
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "on_train_batch_end", watch)
        run(TINY.but(epochs=2, accumulate=3, schedule=ScheduleConfig(name="constant")), tmp_path / "run")
    # 48 images are 3 batches of 16, so an epoch has one step. The learning rate is 0.02 for 16 images.
    assert [step for step, *_ in seen] == [0, 0, 1, 1, 1, 2]
    assert {batch for _, batch, *_ in seen} == {48}
    assert [rate for *_, rate, _ in seen] == pytest.approx([0.06] * 6)
    assert [used for *_, used in seen] == pytest.approx([0.06] * 6)


def test_warmup_goes_by_steps(tmp_path):
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Classification,
            "on_before_optimizer_step",
            lambda self, optimizer: rates.append(optimizer.param_groups[0]["lr"]),
        )
        run(TINY.but(epochs=3, schedule=ScheduleConfig(name="constant", warmup_epochs=2)), tmp_path / "run")
    assert rates == pytest.approx([0.02 * min(step / 6, 1) for step in range(9)])


def test_weight_decay_can_leave_out_norms(tmp_path):
    for decay_norms in (True, False):
        task = task_of(TINY.but(optimizer=replace(TINY.optimizer, weight_decay=0.5, decay_norms=decay_norms)))
        # the trainer is asked for the batch and the number of steps only
        given = {"train_dataloader": lambda self: [0] * 3, "train": [0] * 300, "config": TINY.data}
        loader = type("Data", (), given)()
        task._trainer = type("Trainer", (), {"world_size": 1, "datamodule": loader})()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer = task.configure_optimizers()["optimizer"]
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        trained_ = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained_ == {id(p) for p in task.model.parameters()}
        expected = {id(p) for name, p in task.model.named_parameters() if decay_norms or not spared(name)}
        assert decayed == expected


def spared(name: str) -> bool:
    """Return whether a parameter of a small ResNet is a bias or belongs to a batch norm, by torchvision's names."""
    return name.endswith(".bias") or ".bn" in name or name.startswith("bn") or "downsample.1" in name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cross-entropy", "bce"])
def test_losses_by_explicit_loops(kind, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    task = task_of(TINY.but(loss=kind, label_smoothing=smoothing))
    labels = torch.tensor([0, 2, 1, 1, 0])
    soft = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    soft /= soft.sum(1, keepdim=True)
    for given, shares in ((labels, F.one_hot(labels, 3).double()), (soft, soft)):
        total = 0.0
        for n in range(5):
            partition = sum(math.exp(z) for z in logits[n].tolist())
            for k in range(3):
                z, q = logits[n, k].item(), shares[n, k].item() * (1 - smoothing) + smoothing / 3
                p = 1 / (1 + math.exp(-z))
                total -= q * math.log(math.exp(z) / partition) if kind == "cross-entropy" else 0
                total -= q * math.log(p) + (1 - q) * math.log(1 - p) if kind == "bce" else 0
        assert task.loss(logits, given).item() == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0), (0, 0.5), (0.5, 0.5)])
def test_mixup_and_cutmix(mixup, cutmix):
    task = task_of(TINY.but(mixup=mixup, cutmix=cutmix))
    assert task.mix is not None
    torch.manual_seed(1)
    kinds = set()
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8) / 4
    for _ in range(40):
        mixed, shares = task.mix(images, torch.tensor([0, 1, 2, 0]))
        assert torch.allclose(shares.sum(1), torch.ones(4))
        values = len(mixed[1].unique())
        kinds.add(
            "mixup" if values == 1 and mixed[1].unique().item() not in (0, 0.25) else "cutmix" if values > 1 else ""
        )
    assert kinds - {""} == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_ema_keeps_the_running_mean_and_evaluates_it(tmp_path):
    steps: list[Tensor] = []
    original = Classification.on_train_batch_end

    def watch(self: Any, *args: Any) -> None:
        steps.append(self.model.conv1.weight.detach().clone())
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "on_train_batch_end", watch)
        report = run(TINY.but(epochs=2, ema_decay=0.6), tmp_path / "run")
    mean = steps[0].double()
    for weight in steps[1:]:
        mean = 0.6 * mean + 0.4 * weight.double()
    saved = content(report.last_checkpoint)
    # The bound is for five float32 updates of numbers below 1.
    assert (saved["state_dict"]["model.conv1.weight"] - mean).abs().max() < 5 * torch.finfo(torch.float32).eps
    assert torch.equal(saved["current_model_state"]["model.conv1.weight"], steps[-1])
    assert trained.evaluate(report.last_checkpoint)["val_loss"] == pytest.approx(report.metrics["val_loss"], rel=1e-4)


def test_lower_precision_computes_in_it_and_keeps_float32_weights(tmp_path):
    seen = set()
    original = Classification.loss

    def watch(self: Any, logits: Tensor, labels: Tensor) -> Tensor:
        seen.add(logits.dtype)
        return original(self, logits, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "loss", watch)
        report = run(TINY.but(epochs=1, precision="bf16-mixed"), tmp_path / "run")
    assert seen == {torch.bfloat16}
    assert {w.dtype for name, w in weights(report).items() if "num_batches" not in name} == {torch.float32}


def test_float16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ConfigError, match="16-mixed needs a GPU"):
        run(TINY.but(precision="16-mixed"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last(channels_last):
    task = task_of(TINY.but(channels_last=channels_last))
    weight = task.model.get_submodule("layer1.0.conv1").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last  # pyright: ignore[reportCallIssue]


def test_compiled_networks_keep_their_names():
    plain, compiled = task_of(TINY), task_of(TINY.but(compile=True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert compiled.model._compiled_call_impl is not None


# devices


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", ("cuda", "auto")), ("cuda", ("cuda", "auto")), ("cuda:2", ("cuda", [2]))]
)
def test_a_numbered_gpu_is_the_only_one(tmp_path, monkeypatch, four_gpus, device, expected):
    chosen: list[tuple[object, object]] = []

    def trainer(**options: Any) -> None:
        chosen.append((options["accelerator"], options["devices"]))
        raise ValueError("enough")

    monkeypatch.setattr(L, "Trainer", trainer)
    with pytest.raises(ConfigError, match="enough"):
        train.run(TINY, folder=tmp_path / "run", device=device, quiet=True)
    assert chosen == [expected]


def test_one_gpu_is_not_several(tmp_path, four_gpus):
    with pytest.raises(ConfigError, match="device 'cuda:2' is one GPU, but devices=4; use device='cuda' for several"):
        train.run(TINY, folder=tmp_path / "run", device="cuda:2", devices=4, quiet=True)


def test_a_device_that_is_not_there_is_refused_by_every_function(tmp_path):
    refused = pytest.raises(ConfigError, match="no device 'cuda:9' on this machine; choose one of auto, cpu")
    with refused:
        train.run(TINY, folder=tmp_path / "run", device="cuda:9")
    with refused:
        trained.evaluate(tmp_path, device="cuda:9")
    with refused:
        next(trained.predict(task_of(TINY), [], device="cuda:9"))
    assert not (tmp_path / "run").exists()


# interrupted runs


class CrashError(Exception):
    """An error that no code of a run handles."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"ema_decay": 0.8, "mixup": 0.3, "accumulate": 2}, id="everything"),
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_run(tmp_path, changes, workers):
    recipe = TINY.but(**changes)
    recipe = recipe.but(data=recipe.data.but(workers=workers))
    whole = run(recipe, tmp_path / "whole")

    class Crash(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 1:
                raise CrashError

    with pytest.raises(CrashError):
        run(recipe, tmp_path / "broken", callbacks=[Crash()])
    resumed = run(recipe, tmp_path / "broken", resume=True)
    assert equal(weights(resumed), weights(whole))
    timed = ("images_per_second", "seconds")
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    assert resumed.artifacts["confusion"] == whole.artifacts["confusion"]


def test_a_finished_run_resumed_reports_the_same(tmp_path):
    report = run(TINY.but(epochs=2, ema_decay=0.5), tmp_path / "run")
    before = weights(report)
    again = run(TINY.but(epochs=2, ema_decay=0.5), tmp_path / "run", resume=True)
    assert again.history == report.history
    assert again.artifacts["confusion"] == report.artifacts["confusion"]
    assert equal(weights(again), before)


def test_resuming_something_else_is_refused(tmp_path):
    run(TINY.but(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="another recipe: optimizer.momentum is 0.9 there and 0.5 here"):
        run(TINY.but(epochs=1, optimizer=replace(TINY.optimizer, momentum=0.5)), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"no run to resume here \(recipe.json is missing\)"):
        run(TINY, tmp_path / "nothing", resume=True)


TRAIN = """
import sys, time
from pathlib import Path
import lightning, pytest
from tiny_runs import TINY, add_tiny, run

class Wait(lightning.Callback):
    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            print("in the second epoch", flush=True)
            time.sleep(600)

add_tiny(pytest.MonkeyPatch())
run(TINY.but(epochs=2), Path(sys.argv[1]), callbacks=[Wait()])
"""


def test_a_killed_run_resumes(tmp_path):
    """The run is stopped by SIGKILL in its second epoch."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "in the second epoch\n"
        assert (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert not (tmp_path / "killed" / "report.html").exists()
    recipe = read_recipe(tmp_path / "killed")
    threads = torch.get_num_threads()
    resumed = run(recipe, tmp_path / "killed", resume=True)
    assert torch.get_num_threads() == threads
    whole = run(recipe, tmp_path / "whole")
    assert [row["epoch"] for row in resumed.history] == [1, 2]
    assert resumed.metrics["top1"] == pytest.approx(whole.metrics["top1"], abs=3)
    # The first epoch ran in another process, where floating-point sums may have another order.
    if resumed.history[0]["train_loss"] == whole.history[0]["train_loss"]:
        assert equal(weights(resumed), weights(whole))


# files


def test_checkpoints_hold_only_tensors_and_plain_values(tmp_path):
    report = run(TINY.but(epochs=1, ema_decay=0.9), tmp_path / "run")
    for path in (report.best_checkpoint, report.last_checkpoint):
        assert content(path)["ecanet"]["recipe"] == to_dict(report.recipe)
    left = [p.name for p in report.folder.rglob("*") if p.name.startswith(".")]
    assert set(left) <= {".lock"}  # which the next run takes


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def half(content: Any, target: Any) -> None:
        Path(target).write_bytes(b"ha")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.AtomicCheckpointIO().save_checkpoint({}, path)
    assert path.read_bytes() == b"old"


# trained networks


def test_evaluate_returns_the_metrics_of_the_run(tmp_path):
    report = run(TINY, tmp_path / "run")
    best = trained.evaluate(report.folder)
    assert best["top1"] == pytest.approx(report.metrics["best_top1"])
    last = trained.evaluate(report.last_checkpoint)
    assert last["val_loss"] == pytest.approx(report.metrics["val_loss"], rel=1e-5)


def test_weights_without_a_recipe(tmp_path):
    network = create_model("resnet20", num_classes=3, in_channels=1)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ConfigError, match="name it with --model"):
        trained.evaluate(tmp_path / "plain.pth")
    model = ModelConfig(name="resnet20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecanet.recipes.named.RECIPE_FOR_DATA", {"tiny": lambda: TINY})
        found = trained.evaluate(tmp_path / "plain.pth", model=model, data_name="tiny")
        images, labels = load_tiny(None, False)
        with torch.inference_mode():
            logits = network.eval()(SMALL_SETS["tiny"].spec.normalize(images))
        assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        with pytest.raises(CheckpointError, match="does not fit ResNet: 180 tensors beside the head are missing"):
            trained.evaluate(tmp_path / "plain.pth", model=ModelConfig(name="resnet56"), data_name="tiny")


def test_a_run_is_not_evaluated_on_other_classes(tmp_path):
    report = run(TINY.but(epochs=1), tmp_path / "run")
    with pytest.raises(DataError, match="digits has 10 classes .* the network 3"):
        trained.evaluate(report.folder, data_name="digits")


def test_predictions(tmp_path):
    report = run(TINY.but(epochs=8), tmp_path / "run")
    task = restore(report.folder)
    files = trained.image_files(report.folder / "examples")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    answers = list(trained.predict(task, [*files[:2], broken, *files[2:]], top=2))
    assert isinstance(answers[2], DataError)
    assert str(broken) in str(answers[2])
    found = [answer for answer in answers if isinstance(answer, trained.Prediction)]
    assert [answer.path for answer in found] == [str(file) for file in files]
    right = 0
    for answer in found:
        probabilities = [probability for _, probability in answer.classes]
        assert len(probabilities) == 2
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-6
        right += answer.classes[0][0] in answer.path
    # The file names contain the true class.
    assert right >= 0.8 * len(found)


def test_image_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        trained.image_files(tmp_path / "nothing")
    with pytest.raises(DataError, match="no images in this folder"):
        trained.image_files(tmp_path)


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    """Two processes on a CPU under torchrun have twice the batch, one folder and one report."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "ecanet"]
    options = ["train", "quickstart", "--epochs", "3", "--device", "cpu", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "batch 128 = 64 images × 2 devices" in done.stdout
    assert done.stdout.count("report ") == 1
    report = Report.read(tmp_path / "run")
    assert [row["epoch"] for row in report.history] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_quickstart_reaches_97_percent(tmp_path, seed):
    from ecanet.recipes.named import quickstart

    assert run(quickstart().but(seed=seed), tmp_path / "run").metrics["top1"] >= 97


def test_lightnings_versions_that_were_malicious_are_not_used():
    assert tuple(int(part) for part in L.__version__.split(".")[:3]) >= (2, 6, 4)


def test_a_moved_run_still_knows_its_best(tmp_path):
    there, here = (
        checkpoints.RunCheckpoint(dirpath=tmp_path / name, filename="best", monitor="top1", mode="max") for name in "ab"
    )
    there.best_model_score, there.best_model_path = torch.tensor(97.0), str(tmp_path / "a" / "best.ckpt")
    there.best_k_models = {there.best_model_path: torch.tensor(97.0)}
    here.load_state_dict(there.state_dict())
    assert here.best_model_score == 97
    assert here.best_model_path == str(tmp_path / "b" / "best.ckpt")
    assert here.best_k_models == {str(tmp_path / "b" / "best.ckpt"): torch.tensor(97.0)}


def photographs(folder: Path, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write four images of each class in ImageNet's layout, and return ``folder``."""
    from ecanet.report.figures import to_png

    random = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for at in range(4):
                image = torch.randint(0, 256, (3, 40, 40), generator=random, dtype=torch.uint8)
                (folder / part / name / f"{at}.png").write_bytes(to_png(image))
    return folder


def of_photographs(folder: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        data=DataConfig(name=f"folder:{folder}", image_size=16, batch_size=4, workers=0),
        model=ModelConfig(name="resnet8"),
        epochs=3,
    )
    return recipe.but(**changes)


def test_an_interrupted_run_on_photographs_draws_the_same_crops(tmp_path):
    recipe = of_photographs(photographs(tmp_path / "photos"))
    recipe = recipe.but(data=recipe.data.but(workers=1))
    whole = run(recipe, tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "on_train_epoch_start", stop_in_epoch(2, Classification.on_train_epoch_start))
        with pytest.raises(RuntimeError, match="cut off"):
            run(recipe, cut)
    assert equal(weights(run(recipe, cut, resume=True)), weights(whole))


def stop_in_epoch(epoch: int, before: Any) -> Any:
    def started(self: Classification) -> None:
        if self.current_epoch == epoch:
            raise RuntimeError("cut off")
        before(self)

    return started


def test_a_run_does_not_resume_with_other_classes(tmp_path):
    photos = photographs(tmp_path / "photos")
    recipe = of_photographs(photos, epochs=1)
    run(recipe, tmp_path / "run")
    for part in ("train", "val"):
        (photos / part / "cat").rename(photos / part / "elk")
    with pytest.raises(DataError, match="the first that differs is dog for cat"):
        run(recipe, tmp_path / "run", resume=True)
    from ecanet.studies.gates import pages as inspect_pages

    with pytest.raises(DataError, match="the first that differs is dog for cat"):
        inspect_pages.run(tmp_path / "run", tmp_path / "page")
    with pytest.raises(DataError, match=r"digits has 10 classes"):
        inspect_pages.run(tmp_path / "run", tmp_path / "page", data_name="digits")


def test_a_batch_is_no_larger_than_the_data(tmp_path, capsys):
    photos = photographs(tmp_path / "photos")
    big = of_photographs(photos, epochs=1, data=DataConfig(name=f"folder:{photos}", image_size=16, workers=0))
    report = run(big, tmp_path / "run")
    # There are 8 images, fewer than the batch of 256, so the learning rate is for 8.
    rate = big.optimizer.learning_rate * 8 / big.optimizer.base_batch
    assert report.history[0]["learning_rate"] == pytest.approx(rate)
    with pytest.raises(ConfigError, match="accumulate=9 batches make a step, but an epoch has 2"):
        run(of_photographs(photos, accumulate=9), tmp_path / "more")


def test_a_row_has_the_learning_rate_of_its_epoch(tmp_path):
    from ecanet.recipes import ScheduleConfig

    recipe = of_photographs(photographs(tmp_path / "photos"))
    recipe = recipe.but(schedule=ScheduleConfig(name="step", milestones=(1, 2)))
    rates = [row["learning_rate"] for row in run(recipe, tmp_path / "run").history]
    assert rates == pytest.approx([rates[0], rates[0] / 10, rates[0] / 100])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a Ctrl-C that Python drops
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])  # SIGUSR1 becomes a SIGTERM
def test_a_terminated_run_has_its_own_exit_code(ecanet, tmp_path, sent, code):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it

    def send():
        first = tmp_path / "run" / "checkpoints" / "last.ckpt"
        while not (ended or first.exists()):
            time.sleep(0.1)
        if not ended:
            os.kill(os.getpid(), sent)

    ended, sender = [], threading.Thread(target=send)
    sender.start()
    options = ["--model", "resnet8", "--epochs", 900, "--device", "cpu", "--out", "run"]
    try:
        found, out, err = ecanet("train", "digits", *options)
    finally:
        ended.append(True)
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert found == code, out[-2000:] + err
    assert "continue with: ecanet train --resume" in out + err
    assert sent == signal.SIGINT or f"stopped by {sent.name}" in out + err


def test_of_equally_accurate_epochs_the_one_with_the_lower_loss_is_best(tmp_path):
    callback = checkpoints.RunCheckpoint(tmp_path, "best", monitor="top1", mode="max")
    better = []
    for top1, loss in [(50, 1.0), (100, 1.1), (100, 0.5), (100, 0.7), (90, 0.1), (100, 0.4)]:
        score = torch.tensor(float(top1))
        metrics = {"top1": score, "val_loss": torch.tensor(loss)}
        better.append(callback.check_monitor_top_k(SimpleNamespace(callback_metrics=metrics, strategy=ONE), score))
        if better[-1]:
            callback.best_model_score, callback.best_k_models = score, {str(tmp_path / "best.ckpt"): score}
            callback.kth_best_model_path = str(tmp_path / "best.ckpt")
    assert better == [True, True, True, False, False, True]
    again = checkpoints.RunCheckpoint(tmp_path, "best", monitor="top1", mode="max")
    again.load_state_dict(callback.state_dict())
    assert again.lowest_loss == pytest.approx(0.4)
