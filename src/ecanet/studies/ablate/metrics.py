"""The metric that an ablation compares: its task's own monitor, with the words and digits to show it."""

from dataclasses import dataclass

from ecanet.recipes import Recipe
from ecanet.training import TASKS

__all__ = ["TOP1", "Metric", "find_metric"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric of a run and how it is shown.

    Attributes:
        name: its name in the run's metrics.
        label: what a table calls it.
        unit: its unit; empty for shares from 0 to 1.
        points: what a difference is counted in.
        meaning: the beginning of a sentence that says what it is.
        digits: decimal places.
        also: metrics that are shown beside it, where the runs have them: labels by name.
    """

    name: str
    label: str
    unit: str = ""
    points: str
    meaning: str
    digits: int = 3
    also: tuple[tuple[str, str], ...] = ()

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def caption(self) -> str:
        """The label and the unit as a sentence."""
        return f"{self.label[:1].upper()}{self.label[1:]}{' in percent' if self.unit == '%' else ''}."


TOP1 = Metric(
    name="top1",
    label="top-1",
    unit="%",
    points="points of top-1",
    meaning="Top-1 is the held-out accuracy after the last epoch",
    digits=2,
)
BOX_AP = Metric(
    name="AP",
    label="box AP",
    points="box AP, from 0 to 1",
    meaning="AP is COCO's average precision on the held-out images after the last epoch, from 0 to 1",
    also=(("mask_AP", "mask AP"),),
)


def find_metric(recipe: Recipe) -> Metric:
    """Return the metric by which the task of ``recipe`` selects its best checkpoint.

    >>> find_metric(Recipe(task="detection")).label
    'box AP'
    """
    name = TASKS[recipe.task].monitor
    known = {metric.name: metric for metric in (TOP1, BOX_AP)}
    other = Metric(name=name, label=name, points=name, meaning=f"{name} is measured after the last epoch")
    return known.get(name, other)
