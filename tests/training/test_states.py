"""A checkpoint whose entries are broken under a right checksum is refused in one line, before anything is written."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import pytest
import torch

from ecanet.errors import CheckpointError
from ecanet.recipes import CheckpointConfig, ModelConfig
from ecanet.training import read_recipe, trainer
from ecanet.training.states import check_state
from fuzzing import SEED, Tally, break_value
from tiny_runs import TINY, add_tiny, content, run

RECIPE = TINY.but(
    model=ModelConfig(name="resnet8"), epochs=2, ema_decay=0.8, accumulate=2, checkpoint=CheckpointConfig(steps=1)
)
LOOP = "loops fit_loop "
BATCHES = LOOP + "epoch_loop.batch_progress current "
MOMENTS = "optimizer_states 0 state 3 momentum_buffer"


class Stop(L.Callback):
    """Ends a run in the second epoch, after its first step."""

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of a run that was stopped within its last epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        add_tiny(patch)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, folder, callbacks=[Stop()])
    return folder


@pytest.fixture
def run_dir(stopped, tmp_path, monkeypatch):
    """Return a copy of the stopped run."""
    add_tiny(monkeypatch)
    return shutil.copytree(stopped, tmp_path / "run")


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def find(values: Any, place: str) -> tuple[Any, Any]:
    """Return the dictionary or list, and its key, of a ``place`` such as "callbacks History rows"."""
    *parents, last = place.split(" ")
    for name in parents:
        values = values[int(name)] if name.isdigit() else next(v for k, v in values.items() if k.startswith(name))
    return values, int(last) if last.isdigit() else next((key for key in values if key.startswith(last)), last)


def fill(value: float) -> Any:
    return lambda old: torch.full_like(old, value)


GONE = object()
BROKEN = [
    *((place, GONE, "is missing")
      for place in (
        "epoch", "state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks", "ClassificationData",
        "current_model_state", "averaging_state", "ecanet means", "callbacks History", "callbacks WeightAveraging",
        "callbacks RunCheckpoint", "state_dict model.conv1.weight", "lr_schedulers 0 _last_lr", LOOP + "epoch_progress",
        MOMENTS, "optimizer_states 0 param_groups 0 initial_lr", "callbacks RunCheckpoint best_model_path",
    )),
    ("global_step", 2.5, "is 2.5 and not a count"),
    ("epoch", True, "is True and not a count"),
    ("loops", [], "is [] and not a dictionary"),
    (BATCHES + "ready", -1, "is -1 and not a count"),
    (BATCHES + "ready", 3, "is 3, which \'"),
    (LOOP + "epoch_progress current processed", 0, "is 0, which \'"),
    (LOOP + "epoch_loop.batch_progress is_last_batch", "no", "is 'no' and not True or False"),
    ("lr_schedulers", [], "has 0 items and not 1"),
    ("lr_schedulers 0 base_lrs", [0.1, 0.1], "has 2 items and not 1"),
    ("lr_schedulers 0 base_lrs", [float("nan")], "is nan and not a finite number"),
    ("lr_schedulers 0 last_epoch", 7, "is 7, which \'"),
    ("lr_schedulers 0 step", 7, "has 'step', which is no state"),
    ("optimizer_states 0 state", {}, "has 0 parameters and not "),
    ("optimizer_states 0 state 900", {}, "has 900, which is none of "),
    ("optimizer_states 0 param_groups 0 momentum", 0.5, "is 0.5 and not 0.9"),
    ("optimizer_states 0 param_groups 0 maximize", True, "is True and not False"),
    ("optimizer_states 0 param_groups 0 params", [0], "is [0] and not [0, 1"),
    ("optimizer_states 0 param_groups 0 lr", float("inf"), "is inf and not a finite number"),
    (MOMENTS, fill(float("nan")), "holds NaN or infinity"),
    (MOMENTS, torch.zeros(1), "is a tensor of shape (1,)"),
    (MOMENTS, lambda old: old.double(), "and torch.float64, not a tensor of shape"),
    (MOMENTS, None, "is None and not a tensor"),
    ("current_model_state model.conv1.weight", fill(float("inf")), "holds NaN or infinity"),
    ("state_dict model.conv1.weight", lambda old: old[1:], "is a tensor of shape (15, 1, 3, 3)"),
    ("state_dict model.more", torch.zeros(1), "has 'model.more', which this network has not"),
    ("averaging_state n_averaged", torch.tensor(0), "is 0, which \'"),
    ("callbacks History rows", [], "is 0, which \'"),
    ("callbacks History rows 0", {}, "is [{}] and not a row of numbers for each epoch"),
    ("callbacks History seconds", 1.0, "is 1.0 and not two durations"),
    ("callbacks RunCheckpoint best_model_score", torch.zeros(2), "and not a metric's value or None"),
    ("callbacks RunCheckpoint lowest_loss", float("nan"), "is nan and not a loss"),
    ("ClassificationData first_epoch", 0, "is 0, which \'"),
    ("ClassificationData first_batch", None, "is None and not a count"),
    ("ecanet means sums train_loss", float("nan"), "and not sums of losses"),
    ("pytorch-lightning_version", "new", "is 'new' and not a version"),
]  # fmt: skip


@pytest.fixture(scope="module")
def known(stopped):
    """Return the trainer, the task and the data of a run that goes on, with which its checkpoint is checked."""
    found: list[Any] = []

    def note(path: Path, content: object, *parts: Any) -> None:
        found.extend(parts)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        add_tiny(patch)
        patch.setattr(trainer, "check_state", note)
        with pytest.raises(KeyboardInterrupt):
            run(read_recipe(stopped), stopped, resume=True)
    return found


def break_entry(values: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return a copy of ``values`` with another value at ``place``, or none."""
    broken = copy.deepcopy(values)
    group, key = find(broken, place)
    if value is GONE:
        del group[key]
    else:
        group[key] = value(group[key]) if callable(value) else value
    return broken


def test_a_broken_entry_is_named_in_one_line(stopped, known):
    path = stopped / "checkpoints" / "last.ckpt"
    whole = content(path)
    check_state(path, whole, *known)
    for place, value, expected in BROKEN:
        with pytest.raises(CheckpointError) as caught:
            check_state(path, break_entry(whole, place, value), *known)
        message = str(caught.value)
        assert message.startswith(f"{path}: the run cannot go on from it, since its entry '")
        assert f"'{place.split(' ')[0]}" in message, (place, message)
        assert expected in message, (place, message)
        assert "\n" not in message
        assert len(message) < 1000


@pytest.mark.parametrize(("place", "value"), [("loops", GONE), ("ecanet batch", 7), ("ecanet", [])])
def test_nothing_is_written_where_an_entry_is_broken(run_dir, place, value):
    path = run_dir / "checkpoints" / "last.ckpt"
    torch.save(break_entry(content(path), place, value), path)
    before = read_all(run_dir)
    with pytest.raises(CheckpointError, match="last.ckpt: ") as caught:
        run(read_recipe(run_dir), run_dir, resume=True)
    assert "\n" not in str(caught.value)
    assert read_all(run_dir) == before


def test_a_run_keeps_the_kernel_sizes_of_the_weights_that_it_began_with(tmp_path, monkeypatch):
    add_tiny(monkeypatch)
    run(RECIPE.but(epochs=1, ema_decay=None, model=ModelConfig(name="resnet8", kernel_sizes=7)), tmp_path / "first")
    weights = str(tmp_path / "first" / "checkpoints" / "last.ckpt")
    recipe = RECIPE.but(model=ModelConfig(name="resnet8", weights=weights))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", callbacks=[Stop()])
    report = run(recipe, tmp_path / "run", resume=True)
    assert content(report.last_checkpoint)["state_dict"]["model.layer1.0.eca.conv.weight"].shape == (1, 1, 7)


def break_tensor(random: Random, values: Any) -> None:
    """Change a random tensor in ``values``: its numbers, its shape or its dtype."""
    places = [(values, key) for key in values] if isinstance(values, dict) else list(enumerate_list(values))
    places = [(group, key) for group, key in places if isinstance(group[key], dict | list | torch.Tensor)]
    if not places:
        return
    group, key = random.choice(places)
    old = group[key]
    if not isinstance(old, torch.Tensor):
        break_tensor(random, old)
        return
    new = old.clone().flatten()
    match random.randrange(4):
        case 0 if new.is_floating_point() and len(new):
            new[random.randrange(len(new))] = random.choice((float("nan"), float("inf")))
            group[key] = new.reshape(old.shape)
        case 1:
            group[key] = new[: random.randrange(len(new) + 1)]
        case 2:
            group[key] = old.to(random.choice((torch.int8, torch.float16, torch.complex64, torch.bool)))
        case _:
            group[key] = old[None]


def enumerate_list(values: list[Any]) -> Iterator[tuple[list[Any], int]]:
    yield from ((values, at) for at in range(len(values)))


@pytest.mark.parametrize(("count", "runs"), [(60, 1), pytest.param(3000, 100, marks=pytest.mark.fuzz)])
def test_random_changes(run_dir, known, count, runs):
    """Each is refused in one line, or the run goes on to its end; of those at most ``runs`` are tried."""
    path, recipe, random, tally = (
        run_dir / "checkpoints" / "last.ckpt",
        read_recipe(run_dir),
        Random(SEED),
        Tally("states"),
    )
    whole = content(path)
    saved = shutil.copytree(run_dir, run_dir.with_name("saved"))

    def go_on(values: Any) -> str:
        nonlocal runs
        check_state(path, values, *known)
        if not runs:
            return "taken, not tried"
        runs -= 1
        shutil.rmtree(run_dir)
        shutil.copytree(saved, run_dir)
        torch.save(values, path)
        run(recipe, run_dir, resume=True)
        return "taken and tried"

    for case in range(count):
        values = copy.deepcopy(whole)
        if random.random() < 0.4:
            break_tensor(random, values)
        else:
            # Most tensors lie in two entries, so the others are chosen first.
            name = random.choice([*values, "loops", "callbacks", "optimizer_states", "lr_schedulers"])
            values[name] = break_value(random, values[name])
        tally.call(f"case {case}", lambda values=values: go_on(values))
    tally.finish()
