"""Publish the network of a run: a folder for others, whose model card is written from what the run has measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ecanet import networks, training
from ecanet.deploy import Measured, Metric, save_pretrained
from ecanet.errors import ConfigError, DataError
from ecanet.models import read_file
from ecanet.networks import Pretrained
from ecanet.recipes import Recipe, to_dict
from ecanet.report import UNITS, Report
from ecanet.studies import cost
from ecanet.studies.ablate import estimate

__all__ = ["publish"]

PICTURES = ("classes.png", "weights.png")
"""Pictures of the gates that `ecanet inspect` draws, the better one first."""


def publish(run: str | Path, folder: str | Path, *, which: str = "best") -> Pretrained:
    """Write the network of a finished ``run`` into ``folder`` by `ecanet.save_pretrained`; return its description.

    The card has the run's data, recipe, held-out metrics and cost; mean and interval over the runs beside it that have
    the same recipe with other seeds; and a picture of the gates if ``ecanet inspect RUN --out RUN/inspect`` has drawn
    one. Paths of this machine are shortened to their last part.

    Args:
        run: the run's directory.
        folder: the folder to write.
        which: "best", the epoch with the best held-out metric, or "last".

    Raises:
        ConfigError: ``run`` is no finished run of a classifier, or its network cannot be given to others.
        CheckpointError: the checkpoint is missing or broken.
    """
    run = Path(run)
    training.check_finished(run, which)
    report, checkpoint = Report.read(run), run / "checkpoints" / f"{which}.ckpt"
    task = training.restore(checkpoint)
    if not isinstance(task, training.Classification):
        raise ConfigError(f"{run} is a detector's run, and only classifiers can be published; share `ecanet weights`")
    recipe, spec = task.recipe, task.spec
    epoch = cast(int, cast(dict[str, object], read_file(checkpoint))["epoch"])
    ours = networks.is_ours(recipe.model.name)
    counted = cost.count(task.model, (spec.channels if ours else 3, spec.size, spec.size))
    public = _shorten_paths(recipe)
    measured = Measured(
        data=public["data"]["name"],
        metrics=_collect_metrics(run, report, which, epoch),
        cost=[
            ("parameters", f"{counted.parameters:,}, {counted.attention_parameters:,} of them in gates"),
            ("multiply-accumulates", f"{counted.macs:,} for one image"),
            ("size of the tensors", f"{counted.bytes:,} bytes"),
            ("training and evaluation", f"{report.seconds:,.0f} s ({_describe_machine(report)})"),
        ],
        notes=[_describe_choice(recipe, which, epoch)],
        picture=_find_picture(run),
    )
    return save_pretrained(
        task.model,
        folder,
        network=recipe.model,
        class_names=spec.class_names,
        preprocessing=training.describe_images(task),
        recipe=public,
        measured=measured,
    )


def _shorten_paths(recipe: Recipe) -> dict[str, Any]:
    """Return ``recipe`` as plain values without the folders of this machine."""
    values = cast(dict[str, Any], to_dict(recipe))
    kind, _, path = recipe.data.name.partition(":")
    if "/" in path or "\\" in path:
        values["data"]["name"] = f"{kind}:{_take_name(path)}"
    values["data"]["root"] = None
    if (weights := recipe.model.weights) not in (None, "default"):
        values["model"]["weights"] = _take_name(weights)
    return values


def _take_name(path: str) -> str:
    """Return the last part of a path or an address."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _collect_metrics(run: Path, report: Report, which: str, epoch: int) -> list[Metric]:
    """Return the held-out metrics of the published epoch; the first one with its interval over seeds."""
    measured = report.history[epoch]
    metrics = [Metric(name=key, label=label, value=measured[key]) for key, label in UNITS.items() if key in measured]
    key = "best_top1" if which == "best" else "top1"
    scores = [report.metrics[key], *(other.metrics[key] for other in _find_other_seeds(run, report.recipe))]
    if len(scores) == 1:
        return metrics
    found = estimate(scores)
    return [
        Metric(name=one.name, label=one.label, value=one.value, mean=found.mean, half=found.half, seeds=len(scores))
        if one.name == "top1"
        else one
        for one in metrics
    ]


def _find_other_seeds(run: Path, recipe: Recipe) -> Sequence[Report]:
    """Return the finished runs beside ``run`` that have its recipe and another seed, one for each seed."""
    found: dict[int, Report] = {}
    for path in sorted(run.absolute().parent.glob("*/metrics.json")):
        try:
            other = Report.read(path.parent)
        except DataError:  # what is broken there is no matter of this run
            continue
        if other.recipe.seed != recipe.seed and other.recipe.but(seed=recipe.seed) == recipe:
            found.setdefault(other.recipe.seed, other)
    return list(found.values())


def _describe_choice(recipe: Recipe, which: str, epoch: int) -> str:
    average = "" if recipe.ema_decay is None else "averaged (EMA) "
    chosen = "; the epoch was chosen on the same held-out images" if which == "best" else ""
    return f"The {average}weights are of epoch {epoch + 1} of {recipe.epochs}{chosen}. Random seed {recipe.seed}."


def _describe_machine(report: Report) -> str:
    """Return the device of the run, with its threads if it is a CPU."""
    found = report.environment
    device, threads = found.get("device", "unknown device"), found.get("threads")
    return f"{device}, {threads} threads" if device == "cpu" and threads else str(device)


def _find_picture(run: Path) -> Path | None:
    places = [folder / name for folder in (run / "inspect", run) for name in PICTURES]
    return next((path for path in places if path.is_file()), None)
