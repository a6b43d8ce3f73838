"""Check the state in a checkpoint before a run goes on from it: training must not begin with a part of it.

The checksum says that a file is whole, and not that a run of this recipe has written it. Lightning passes over entries
that are missing, and fails in the middle of others. So they are compared with what this run would write itself.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from ecanet.data import ClassificationData, DetectionData
from ecanet.errors import CheckpointError, show_value
from ecanet.training.checkpoints import PREVIOUS, RunCheckpoint
from ecanet.training.preparation import find_description
from ecanet.training.progress import History
from ecanet.training.tasks import Task

__all__ = ["check_state", "find_position"]

LARGEST = 2**53
"""Counts are exact as floating-point numbers up to here."""

OPTIMIZER_TENSORS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
"""What PyTorch's optimizers keep of each parameter; SGD without momentum keeps nothing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition for a value, and how a message names it."""

    expected: str
    fits: Callable[[Any], bool]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, Tensor) and not value.shape and not bool(value.isnan()))


def _are(kind: type, fits: Callable[[object], bool], count: int | None = None) -> Callable[[Any], bool]:
    """Return a function that says whether a value is a list, tuple or dictionary whose ``count`` values all fit."""

    def check(value: object) -> bool:
        if not isinstance(value, kind):
            return False
        items = list(cast(Any, value).values() if isinstance(value, dict) else cast(Any, value))
        return count in (None, len(items)) and all(map(fits, items))

    return check


COUNT = Rule("a count", _is_count)
SIZE = Rule("a number of images", lambda value: _is_count(value) and value > 0)
RATE = Rule("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
NONE = Rule("None", lambda value: value is None)
TEXT = Rule("a text", lambda value: isinstance(value, str))
LOSS = Rule("a loss", lambda value: isinstance(value, float) and not math.isnan(value))
SCORE = Rule("a metric's value or None", _is_score)
SCORES = Rule("metrics' values", _are(dict, _is_score))
PARAMETERS = Rule("a list", _are(list, _is_count))
STATES = Rule("a dictionary", _are(dict, lambda _: True))
SUMS = Rule("sums of losses", _are(dict, _is_number))
SECONDS = Rule("two durations", _are(tuple, _is_number, 2))
VERSION = Rule("a version", lambda value: isinstance(value, str) and bool(re.match(r"\d{1,4}(\.\d{1,9}){2}", value)))

BEST = {
    "best_model_score": SCORE, "best_model_path": TEXT, "best_k_models": SCORES, "kth_best_model_path": TEXT,
    "kth_value": SCORE, "last_model_path": TEXT, "lowest_loss": LOSS,
}  # fmt: skip
"""The state of a `RunCheckpoint`."""


def check_state(
    path: Path, content: object, trainer: L.Trainer, task: Task, images: ClassificationData | DetectionData
) -> None:
    """Check that the ``content`` of the checkpoint ``path`` has all that this run needs to go on.

    Raises:
        CheckpointError: an entry is missing, of another kind or size, not finite, or contradicts another one.
    """
    about = find_description(path, content)
    problem = "'ecanet' is missing" if about is None else None
    problem = problem or next(_list_problems(_describe(trainer, task, images), content), None)
    if problem is None:
        values = cast(dict[str, Any], content)
        checks = _list_optimizer_problems(task, values), _list_contradictions(images, values)
        problem = next((found for check in checks for found in check), None)
    if problem is not None:
        raise CheckpointError(
            f"{path}: the run cannot go on from it, since its entry {problem}; put a good copy in its place (such as "
            f"{PREVIOUS}), or begin another run with its weights (--weights {path})"
        )


def find_position(content: Mapping[str, Any], images: ClassificationData | DetectionData) -> tuple[int, int, int]:
    """Return how many epochs, batches of the next one, and steps were done when the checkpoint was written."""
    place = content[type(images).__qualname__]
    return place["first_epoch"], place["first_batch"], content["lr_schedulers"][0]["last_epoch"]


def _describe(trainer: L.Trainer, task: Task, images: ClassificationData | DetectionData) -> dict[str, object]:
    """Return what a checkpoint of this run has, beside what depends on other entries of it.

    Values are dictionaries with the names that must be there, lists, tensors of the same shape, or rules.
    """
    # A gate takes its gain from the file, where it is an entry only if it is not 1.
    weights = {name: value for name, value in task.state_dict().items() if not name.endswith(".gain")}
    precision = trainer.precision_plugin
    averages, callbacks = False, dict[str, object]()
    for callback in cast("list[L.Callback]", cast(Any, trainer).callbacks):
        if isinstance(callback, History):
            rows = Rule("a row of numbers for each epoch", _are(list, partial(_is_row, task.monitor)))
            callbacks[callback.state_key] = {"rows": rows, "images": COUNT, "seconds": SECONDS, "learning_rate": RATE}
        elif isinstance(callback, RunCheckpoint):
            callbacks[callback.state_key] = BEST
        elif isinstance(callback, WeightAveraging):
            averages, callbacks[callback.state_key] = True, {"latest_update_step": COUNT}
    expected: dict[str, object] = {
        "epoch": COUNT,
        "global_step": COUNT,
        "pytorch-lightning_version": VERSION,
        "state_dict": weights,
        "loops": {"fit_loop": _to_rules(cast(Any, trainer).fit_loop.state_dict())},
        "callbacks": callbacks,
        type(images).__qualname__: {"first_epoch": COUNT, "first_batch": COUNT, "images": COUNT},
        "ecanet": {"batch": SIZE, "means": {"sums": SUMS, "images": COUNT}},
    }
    if averages:
        expected |= {"current_model_state": weights, "averaging_state": {"n_averaged": torch.tensor(0)}}
    if scaler := precision.state_dict():
        expected[type(precision).__qualname__] = _to_rules(scaler)
    return expected


def _is_row(monitor: str, row: object) -> bool:
    fits = isinstance(row, dict) and all(type(value) in (int, float) for value in cast(dict[str, object], row).values())
    return fits and {"epoch", "seconds", monitor} <= set(cast(dict[str, object], row))


def _to_rules(value: object) -> object:
    """Return rules for entries like those of ``value``."""
    if isinstance(value, dict):
        return {name: _to_rules(item) for name, item in cast(dict[object, object], value).items()}
    return FLAG if isinstance(value, bool) else COUNT if isinstance(value, int) else RATE


def _list_problems(expected: object, found: object, at: str = "") -> Iterator[str]:
    """Yield what is wrong with ``found``, the entry ``at``: the rest of a sentence."""
    if isinstance(expected, Rule):
        if not expected.fits(found):
            yield f"{at!r} is {show_value(found)} and not {expected.expected}"
    elif isinstance(expected, Tensor):
        yield from _list_tensor_problems(expected, found, at)
    elif not isinstance(found, cast(type, type(expected))):
        yield f"{at!r} is {show_value(found)} and not a {'dictionary' if isinstance(expected, dict) else 'list'}"
    elif isinstance(expected, dict):
        names, values = cast(dict[object, object], expected), cast(dict[object, object], found)
        for name, value in names.items():
            inner = f"{at}.{str(name).partition('{')[0]}".lstrip(".")
            if name in values:
                yield from _list_problems(value, values[name], inner)
            else:
                yield f"{inner!r} is missing"
        if at in ("state_dict", "current_model_state"):
            yield from _list_more_tensors(names, values, at)
    else:
        items, values = cast(list[object], expected), cast(list[object], found)
        if len(items) != len(values):
            yield f"{at!r} has {len(values)} items and not {len(items)}"
            return
        for number, pair in enumerate(zip(items, values, strict=True)):
            yield from _list_problems(*pair, f"{at}.{number}")


def _list_tensor_problems(expected: Tensor, found: object, at: str) -> Iterator[str]:
    kind = f"a tensor of shape {tuple(expected.shape)} and {expected.dtype}"
    if not isinstance(found, Tensor):
        yield f"{at!r} is {show_value(found)} and not {kind}"
    elif (found.shape, found.dtype, found.layout) != (expected.shape, expected.dtype, torch.strided):
        yield f"{at!r} is a tensor of shape {tuple(found.shape)} and {found.dtype}, not {kind}"
    elif found.is_meta or not bool(found.isfinite().all()):
        yield f"{at!r} holds {'no values' if found.is_meta else 'NaN or infinity'}"


def _list_more_tensors(expected: Mapping[object, object], found: Mapping[object, object], at: str) -> Iterator[str]:
    """Yield the entries of ``found`` that are neither a tensor of the network nor a gate's gain."""
    for name in found:
        if isinstance(name, str) and name.endswith(".gain"):
            yield from _list_tensor_problems(torch.tensor(1.0), found[name], f"{at}.{name}")
        elif name not in expected:
            yield f"{at!r} has {show_value(name)}, which this network has not"


def _list_optimizer_problems(task: Task, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the states of the optimizer and of the schedule."""
    made = task.configure_optimizers()
    groups = cast("list[dict[str, Any]]", made["optimizer"].state_dict()["param_groups"])
    rates, functions = [RATE] * len(groups), [NONE] * len(groups)
    schedule = {
        "last_epoch": COUNT, "_step_count": COUNT, "base_lrs": rates, "_last_lr": rates, "lr_lambdas": functions
    }  # fmt: skip
    optimizer = {
        "state": STATES,
        "param_groups": [{"lr": RATE, "initial_lr": RATE, "params": PARAMETERS}] * len(groups),
    }
    problem = next(_list_problems({"optimizer_states": [optimizer], "lr_schedulers": [schedule]}, content), None)
    if problem is not None:
        yield problem
        return
    # The scheduler takes every entry for an attribute.
    for name in content["lr_schedulers"][0]:
        if name == "optimizer" or callable(getattr(torch.optim.lr_scheduler.LambdaLR, str(name), None)):
            yield f"'lr_schedulers.0' has {show_value(name)}, which is no state"
    saved = content["optimizer_states"][0]
    for number, pair in enumerate(zip(groups, saved["param_groups"], strict=True)):
        yield from _list_other_settings(*pair, f"optimizer_states.0.param_groups.{number}")
    yield from _list_moment_problems(task, made["optimizer"], saved["state"], content["ecanet"].get("optimized"))


def _list_other_settings(expected: Mapping[str, Any], found: Mapping[str, Any], at: str) -> Iterator[str]:
    """Yield the settings of a group of parameters that are not the recipe's; the rates change as the run goes on."""
    for name, value in expected.items():
        if name not in ("lr", "initial_lr") and name in found:
            yield from _list_problems(_be(value), found[name], f"{at}.{name}")


def _be(value: object) -> Rule:
    return Rule(show_value(value), lambda found: type(found) is type(value) and found == value)


def _list_moment_problems(
    task: Task, optimizer: torch.optim.Optimizer, found: Mapping[Any, Any], number: object
) -> Iterator[str]:
    """Yield what is wrong with the optimizer's tensors; ``number`` of its parameters have some."""
    config, at = task.recipe.optimizer, "optimizer_states.0.state"
    parameters = [p for group in optimizer.param_groups for p in cast("list[nn.Parameter]", group["params"])]
    names = OPTIMIZER_TENSORS[config.name] if config.name != "sgd" or config.momentum else ()
    for index, values in found.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            yield f"{at!r} has {show_value(index)}, which is none of {len(parameters)} parameters"
            continue
        like = {name: torch.tensor(0.0) if name == "step" else parameters[index].detach() for name in names}
        yield from _list_problems(like, values, f"{at}.{index}")
    if number is not None and len(found) != number:  # checkpoints of before do not have the number
        yield f"{at!r} has {len(found)} parameters and not {show_value(number)}"


def _list_contradictions(images: ClassificationData | DetectionData, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield where two entries say different things about the position in the run."""
    loop, data = content["loops"]["fit_loop"], type(images).__qualname__
    place, schedule = content[data], content["lr_schedulers"][0]
    epochs, batches = (loop[f"{name}_progress"]["current"] for name in ("epoch", "epoch_loop.batch"))
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    rows = next(len(state["rows"]) for name, state in content["callbacks"].items() if name == "History")
    epoch, done, batch = content["epoch"], place["first_epoch"], place["first_batch"]
    pairs = [
        (done, epoch if batch else epoch + 1, f"{data}.first_epoch", "epoch"),
        (rows, done, "callbacks.History.rows", f"{data}.first_epoch"),
        (epochs["processed"], done, "loops.fit_loop.epoch_progress.current.processed", f"{data}.first_epoch"),
        (epochs["completed"], epoch, "loops.fit_loop.epoch_progress.current.completed", "epoch"),
        (steps["completed"], content["global_step"], "loops.fit_loop.epoch_loop.automatic_optimization", "global_step"),
        (
            schedule["last_epoch"],
            loop["epoch_loop.scheduler_progress"]["total"]["completed"],
            "lr_schedulers.0.last_epoch",
            "loops.fit_loop.epoch_loop.scheduler_progress",
        ),
    ]
    pairs += [
        (epochs[name], epoch + 1, f"loops.fit_loop.epoch_progress.current.{name}", "epoch")
        for name in ("ready", "started")
    ]
    if batch:
        pairs += [
            (batches[name], batch, f"loops.fit_loop.epoch_loop.batch_progress.current.{name}", f"{data}.first_batch")
            for name in batches
        ]
    if "averaging_state" in content:
        averaged, state = int(content["averaging_state"]["n_averaged"]), content["callbacks"]["WeightAveraging"]
        pairs += [(averaged, state["latest_update_step"], "averaging_state.n_averaged", "callbacks.WeightAveraging")]
    for value, other, at, at_other in pairs:
        if value != other:
            yield f"{at!r} is {value}, which {at_other!r} contradicts"
