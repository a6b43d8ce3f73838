"""Statistics of an ablation: means over seeds, t intervals, and paired differences to the plain network."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from ecanet.studies.ablate.metrics import TOP1, Metric
from ecanet.studies.ablate.variants import Variant

__all__ = ["Estimate", "Measurement", "Result", "compare", "estimate"]

SIGNIFICANCE = 0.05
"""The probability of calling any of the differences significant if there are none."""


class Measurement(TypedDict):
    """The numbers of one run that are compared."""

    metrics: Mapping[str, float]
    """Held-out metrics after the last epoch."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % t interval (None with one seed)."""

    mean: float
    half: float | None

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The metric of one variant, and its difference to the plain network."""

    variant: Variant
    score: Estimate
    difference: Estimate | None
    """Paired difference to the plain network: runs of the same seed are subtracted. None for the plain network."""
    significant: bool | None
    """Result of a paired t test with Bonferroni's correction for all variants; None with one seed."""
    seconds: float
    """Mean time of a run."""
    by_seed: dict[int, float]
    """The metric of each run."""
    also: dict[str, Estimate]
    """Metrics that are shown beside it, by name."""


def compare(
    variants: Sequence[Variant], measurements: Mapping[tuple[str, int], Measurement], seeds: int, metric: Metric = TOP1
) -> list[Result]:
    """Return the result of each variant in ``metric``; ``measurements`` has an entry for each variant's name and seed.

    The variant "none" is the plain network. With n variants beside it, a difference is significant if its t interval
    of level 1 - 0.05 / n does not contain 0 (Bonferroni).
    """
    runs = {v.name: [measurements[v.name, seed]["metrics"] for seed in range(seeds)] for v in variants}
    scores = {name: {seed: run[metric.name] for seed, run in enumerate(of_name)} for name, of_name in runs.items()}
    also = [name for name, _ in metric.also if all(name in run for of_name in runs.values() for run in of_name)]
    level = 1 - SIGNIFICANCE / max(1, len(variants) - 1)
    results: list[Result] = []
    for variant in variants:
        mine, plain = scores[variant.name], scores["none"]
        differences = [mine[seed] - plain[seed] for seed in range(seeds)]
        corrected = estimate(differences, level=level)
        is_plain = variant.name == "none"
        results.append(
            Result(
                variant=variant,
                score=estimate(list(mine.values())),
                difference=None if is_plain else estimate(differences),
                significant=None if is_plain or corrected.half is None else abs(corrected.mean) > corrected.half,
                seconds=statistics.mean(measurements[variant.name, seed]["seconds"] for seed in range(seeds)),
                by_seed=mine,
                also={name: estimate([run[name] for run in runs[variant.name]]) for name in also},
            )
        )
    return results


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Return the mean of ``values`` and half the width of its t interval.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3)
    (2.0, 2.484)
    """
    from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

    mean = statistics.mean(values)
    if len(values) < 2:
        return Estimate(mean=mean, half=None)
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return Estimate(mean=mean, half=quantile * statistics.stdev(values) / len(values) ** 0.5)
