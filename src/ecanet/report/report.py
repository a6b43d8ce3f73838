"""What a run found, as numbers in JSON and as one self-contained page.

``Report.artifacts`` is what the task kept beside its numbers; `SECTIONS` says how each kind of it is drawn.
"""

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ecanet.errors import DataError
from ecanet.recipes import Recipe, from_dict, to_dict
from ecanet.report import figures

__all__ = ["SECTIONS", "Report", "Section", "environment", "page", "write_file"]

UNITS = {"top1": "top-1, %", "top5": "top-5, %", "best_top1": "best top-1, %", "val_loss": "held-out loss"}

# heading, note, HTML
Section = tuple[str, str, str]


@dataclass(kw_only=True)
class Report:
    """A finished run: what it was, what came out, and where it lies.

    ``metrics`` are the last epoch's, in the task's units (``top1`` in percent), with ``best_…`` for the metric by which
    the best checkpoint was chosen. ``history`` has one dictionary per epoch. ``seconds`` is the training's duration.
    """

    recipe: Recipe
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    folder: Path
    environment: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best held-out metric."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last epoch, from which a run resumes."""
        return self.folder / "checkpoints" / "last.ckpt"

    def to_dict(self) -> dict[str, Any]:
        """All but the artifacts and the folder, as plain values."""
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
        """The report that a run wrote into its ``folder``.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        path = Path(folder) / "metrics.json"
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "recipe": from_dict(Recipe, values["recipe"])}, folder=Path(folder))
        except FileNotFoundError:
            raise DataError(f"{folder}: no finished run here (metrics.json is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a report that this version can read ({error})") from None

    def write(self) -> Path:
        """Write metrics.json, environment.json and report.html into the run's folder; returns the page's path."""
        write_file(self.folder / "metrics.json", json.dumps(self.to_dict(), indent=2))
        write_file(self.folder / "environment.json", json.dumps(self.environment, indent=2))
        for at, example in enumerate(self.artifacts.get("examples", [])):
            label = re.sub(r"\W+", "-", self.artifacts["class_names"][example["label"]])
            write_file(self.folder / "examples" / f"{at:02d}-{label}.png", figures.to_png(example["image"]))
        path = self.folder / "report.html"
        write_file(path, self.to_html())
        return path

    def to_html(self) -> str:
        """The report as one page that needs nothing else."""
        # what was measured on held-out data, losses last
        chosen = sorted((n for n in self.metrics if n not in (*figures.NO_METRIC, "train_loss")), key=_is_loss)
        tiles = [(f"{self.metrics[name]:.4g}", UNITS.get(name, name.replace("_", " "))) for name in chosen]
        tiles += [(f"{self.parameters:,}", "parameters"), (f"{self.seconds:,.0f} s", "training and evaluating")]
        model, data = self.recipe.model, self.recipe.data
        return page(
            title=f"{self.recipe.name}: {model.name} with {model.attention} on {data.name}",
            subtitle=f"{self.recipe.epochs} epochs, seed {self.recipe.seed}, {self.environment.get('date', '')}; "
            "figures are of the last epoch unless they say best, which was chosen on the same held-out data",
            tiles=tiles,
            sections=[section for draw in SECTIONS if (section := draw(self))],
            recipe=json.dumps(to_dict(self.recipe), indent=2),
            environment=self.environment,
        )


def _curves(report: Report) -> Section:
    return "Curves", "", figures.curves(report.history)


def _confusion(report: Report) -> Section | None:
    if not (matrix := report.artifacts.get("confusion")):
        return None
    note = "Rows are what the images are, columns what the network said; the darker, the larger the share of the row."
    return "Confusion", note, figures.confusion(matrix, report.artifacts["class_names"])


def _by_class(report: Report) -> Section | None:
    if not (matrix := report.artifacts.get("confusion")):
        return None
    return "Accuracy by class", "", figures.accuracy_by_class(matrix, report.artifacts["class_names"])


def _examples(report: Report) -> Section | None:
    if not (found := report.artifacts.get("examples")):
        return None
    note = "The first held-out images that the network got right, and the first that it did not."
    return "Examples", note, figures.examples(found, report.artifacts["class_names"])


def _precision_recall(report: Report) -> Section | None:
    if not (found := report.artifacts.get("precision_recall")):
        return None
    note = "An object counts as found where half of the area agrees; mean over the classes."
    return "Precision by recall", note, figures.precision_recall(found)


def _detections(report: Report) -> Section | None:
    if not (found := report.artifacts.get("detections")):
        return None
    note = "The first held-out images on which all is right, and the first on which something is not (truth in white)."
    return "Detections", note, figures.detections(found, report.artifacts["class_names"])


def _is_loss(name: str) -> bool:
    return name.endswith("loss")


# each looks for its artifacts, and gives a heading, a note and HTML, or None where there is nothing to draw
SECTIONS: list[Callable[[Report], Section | None]] = [
    _curves,
    _by_class,
    _confusion,
    _examples,
    _precision_recall,
    _detections,
]


def page(
    *,
    title: str,
    subtitle: str,
    tiles: list[tuple[str, str]],
    sections: list[Section],
    recipe: str,
    environment: dict[str, Any],
) -> str:
    """One self-contained page of HTML; a section is a heading, a note and HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ecanet.report")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")
    return template.render(
        title=title, subtitle=subtitle, tiles=tiles, sections=sections, recipe=recipe, environment=environment
    )


def environment() -> dict[str, Any]:
    """What the run ran on: versions, machine, time."""
    cuda = torch.cuda.is_available()
    versions = {name: _version(name) for name in ("ecanet", "torch", "torchvision", "lightning")}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        file.write(data)
    try:
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
