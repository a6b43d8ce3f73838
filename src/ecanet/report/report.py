"""The results of a run, as numbers in JSON and as one HTML page."""

import html
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ecanet.errors import DataError
from ecanet.recipes import Recipe, from_dict, read_json, to_dict
from ecanet.report import figures, pictures
from ecanet.report.artifacts import Artifacts
from ecanet.report.files import write_file
from ecanet.report.html_page import Section, page
from ecanet.report.machine import Environment

__all__ = ["UNITS", "Report"]

UNITS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "macro": "mean of the classes' accuracies, %",
    "best_top1": "best top-1, %",
    "val_loss": "held-out loss",
}
"""Labels of the metrics, with their units."""


def _no_artifacts() -> Artifacts:
    return {}


@dataclass(kw_only=True)
class Report:
    """A finished run: its recipe, its results, and the ``folder`` that holds its files.

    ``metrics`` are those of the last epoch, in the task's units (``top1`` in percent); ``best_…`` is the value of the
    metric by which the best checkpoint was chosen. ``history`` has one dictionary per epoch, and ``seconds`` is the
    duration of training.
    """

    recipe: Recipe
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    folder: Path
    environment: Environment = field(default_factory=Environment)
    artifacts: Artifacts = field(default_factory=_no_artifacts)

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best held-out metric."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last epoch, from which a run resumes."""
        return self.folder / "checkpoints" / "last.ckpt"

    def to_dict(self) -> dict[str, object]:
        """Return the report as values for JSON, without the artifacts and the folder."""
        return {
            "recipe": to_dict(self.recipe),
            "metrics": self.metrics,
            "history": self.history,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "environment": self.environment,
        }

    @classmethod
    def read(cls, folder: str | Path) -> "Report":
        """Return the report that a run has written into its ``folder``; it has no artifacts.

        Raises:
            DataError: the folder has no report, or the report cannot be read.
        """
        path = Path(folder) / "metrics.json"
        try:
            values = cast(dict[str, Any], read_json(path))
            return cls(
                recipe=from_dict(Recipe, values["recipe"]),
                metrics=values["metrics"],
                history=values["history"],
                seconds=values["seconds"],
                parameters=values["parameters"],
                environment=values["environment"],
                folder=Path(folder),
            )
        except FileNotFoundError:
            raise DataError(f"{folder}: no finished run here (metrics.json is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a report that this version can read ({error})") from None

    def write(self) -> Path:
        """Write metrics.json, environment.json, report.html and the example images; return the page's path."""
        write_file(self.folder / "metrics.json", json.dumps(self.to_dict(), indent=2))
        write_file(self.folder / "environment.json", json.dumps(self.environment, indent=2))
        names = self.artifacts.get("class_names", [])
        for at, example in enumerate(self.artifacts.get("examples", [])):
            label = re.sub(r"\W+", "-", names[example["label"]])[:40]
            write_file(self.folder / "examples" / f"{at:02d}-{label}.png", figures.to_png(example["image"]))
        path = self.folder / "report.html"
        write_file(path, self.to_html())
        return path

    def to_html(self) -> str:
        """Return the report as one HTML page that needs no other file."""
        # held-out metrics first, then their loss; the training's losses are among the curves
        skipped = [*figures.NOT_METRICS, *(name for name in self.metrics if _is_loss(name) and name != "val_loss")]
        chosen = sorted((name for name in self.metrics if name not in skipped), key=_is_loss)
        tiles = [(f"{self.metrics[name]:.4g}", UNITS.get(name, name.replace("_", " "))) for name in chosen]
        tiles += [(f"{self.parameters:,}", "parameters"), (f"{self.seconds:,.0f} s", "training and evaluation")]
        model, data = self.recipe.model, self.recipe.data
        return page(
            title=f"{self.recipe.name}: {model.name} with {model.attention} on {data.name}",
            subtitle=f"{self.recipe.epochs} epochs, seed {self.recipe.seed}, {_show_date(self)}; "
            "values are from the last epoch unless called best; the best epoch was chosen on the same held-out data",
            tiles=tiles,
            sections=[section for draw in SECTIONS if (section := draw(self))],
            recipe=self.recipe,
            environment=self.environment,
        )


def _show_date(report: Report) -> str:
    return str(report.environment.get("date", ""))[:16].replace("T", " ") + " UTC"


def _is_loss(name: str) -> bool:
    return name.endswith("loss")


# sections: each function returns None if its artifacts are missing


def _make_curves(report: Report) -> Section:
    return "Curves", "", figures.plot_curves(report.history)


def _make_accuracy(report: Report) -> Section | None:
    if not (matrix := report.artifacts.get("confusion")):
        return None
    return "Accuracy by class", "", pictures.show_accuracy(matrix, report.artifacts.get("class_names", []))


def _make_confusion(report: Report) -> Section | None:
    if not (matrix := report.artifacts.get("confusion")):
        return None
    note = "Rows are true classes, columns are predicted classes; darker cells hold a larger share of their row."
    return "Confusion matrix", note, figures.plot_confusion(matrix, report.artifacts.get("class_names", []))


def _make_gates(report: Report) -> Section | None:
    if not (gates := report.artifacts.get("gates")):
        return None
    note = "Weights on held-out images, from the network's first gate to its last. The bars hold half of the channels."
    alarms = "".join(f"<li>{html.escape(gate['name'])}: {alarm}</li>" for gate in gates for alarm in gate["alarms"])
    return "Gates", note, figures.plot_gates(gates) + (f"<ul>{alarms}</ul>" if alarms else "")


def _make_usage(report: Report) -> Section:
    run, detector = str(report.folder), report.recipe.task == "detection"
    command = f"ecanet {'detect' if detector else 'predict'} {shlex.quote(run)} image.jpg"
    call = "detect(task, ['image.jpg'], 'found')" if detector else "predict(task, ['image.jpg'])"
    lines = f"from ecanet import training\ntask = training.restore({run!r})\nprint(*training.{call})"
    return "Use it", command, f"<pre>{html.escape(lines)}</pre>"


def _make_examples(report: Report) -> Section | None:
    if not (examples := report.artifacts.get("examples")):
        return None
    note = "The first held-out images that were classified correctly, and the first that were not (dashed)."
    return "Examples", note, pictures.show_examples(examples, report.artifacts.get("class_names", []))


def _make_precision_recall(report: Report) -> Section | None:
    if not (curves := report.artifacts.get("precision_recall")):
        return None
    note = "Mean over the classes; a detection counts if its intersection over union with an object is at least 0.5."
    return "Precision by recall", note, figures.plot_precision_recall(curves)


def _make_detections(report: Report) -> Section | None:
    if not (examples := report.artifacts.get("detections")):
        return None
    note = "The first held-out images with mistakes (dashed; true boxes in white), and the first with none."
    return "Detections", note, pictures.show_detections(examples, report.artifacts.get("class_names", []))


SECTIONS: list[Callable[[Report], Section | None]] = [
    _make_curves,
    _make_accuracy,
    _make_confusion,
    _make_examples,
    _make_gates,
    _make_precision_recall,
    _make_detections,
    _make_usage,
]
