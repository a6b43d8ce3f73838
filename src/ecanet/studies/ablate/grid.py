"""Variants × seeds × one recipe: the same data, budget and seeds for each attention, then differences with intervals.

A cell is one variant with one seed. Each finished cell is a file of its own, written whole, so that a killed ablation
goes on where it was. `ablate_rows` says what the variants are, `ablate_pages` writes the result down.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecanet.errors import ConfigError, EcanetError, check_positive_int
from ecanet.recipes import Recipe, from_dict, to_dict
from ecanet.report import write_file
from ecanet.studies.ablate.rows import VARIANTS, Variant, plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with half the width of its 95 % t interval (None with one seed)."""

    mean: float
    half: float | None

    @property
    def low(self) -> float | None:
        """The lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One row of the table; ``difference`` is to none, seed by seed, and ``beyond_noise`` allows for all rows."""

    variant: Variant
    top1: Estimate
    difference: Estimate | None
    beyond_noise: bool | None
    seconds: float
    by_seed: dict[int, float]


@dataclass(kw_only=True)
class Ablation:
    """What was run, and what came out."""

    recipe: Recipe
    folder: Path
    variants: list[Variant]
    seeds: list[int]
    lines: list[Line] = field(default_factory=list)


def run(
    recipe: Recipe,
    *,
    folder: str | Path,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: int = 5,
    on: str = "here",
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> Ablation:
    """Run every variant with seeds 0, 1, … in ``folder``, or what is left of it, and compare.

    Variants that come to the same network are one row, and ``say`` is told. ``on="ray"`` runs the cells on Ray (extra
    ``cluster``), several at a time. ``threads`` is the number of CPU threads of one cell; results depend on it in their
    last digits, so keep it when going on.

    Raises:
        ConfigError: a variant does not exist, or ``folder`` holds an ablation of another recipe.
        DataError: data that is missing or broken.
    """
    seeds = check_positive_int("seeds", seeds)
    if recipe.seed:
        raise ConfigError(f"an ablation's seeds are 0, 1, …: leave out seed={recipe.seed} and say how many (seeds)")
    folder = Path(folder)
    rows = plan(recipe, variants, say)
    _claim(folder, recipe)
    cells = [(variant, seed) for seed in range(seeds) for variant in rows]
    left = [(variant, seed) for variant, seed in cells if not _finished(folder, recipe, variant, seed)]
    todo = [(str(_cell_file(folder, v, s)), _cell_recipe(recipe, v, s)) for v, s in left]
    say(f"{len(rows)} networks x {seeds} seeds: {len(cells)} cells, {len(cells) - len(todo)} of them finished")
    match on:
        case "here":
            _run_here(todo, threads, say)
        case "ray":
            _run_on_ray(todo, threads or 1, say)
        case _:
            raise ConfigError(f"cannot run on {on!r}; choose 'here' or 'ray'")
    ablation = Ablation(recipe=recipe, folder=folder, variants=rows, seeds=list(range(seeds)))
    ablation.lines = compare(rows, {(v.name, s): _finished(folder, recipe, v, s) or {} for v, s in cells}, seeds)
    return ablation


# running


def _claim(folder: Path, recipe: Recipe) -> None:
    """Take ``folder`` for this recipe, or see that it was taken for it."""
    path = folder / "recipe.json"
    plain = recipe.but(seed=0)
    if path.exists():
        if from_dict(Recipe, json.loads(path.read_text())) != plain:
            raise ConfigError(f"{folder} holds an ablation of another recipe; choose another folder (--out)")
    else:
        write_file(path, json.dumps(to_dict(plain), indent=2))


def _cell_recipe(recipe: Recipe, variant: Variant, seed: int) -> Recipe:
    return recipe.but(model=variant.model, seed=seed)


def _cell_file(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "cells" / f"{variant.name}-seed{seed}.json"


def _finished(folder: Path, recipe: Recipe, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The cell's result, if it has run; ConfigError if what ran under its name was something else."""
    path = _cell_file(folder, variant, seed)
    if not path.exists():
        return None
    cell = json.loads(path.read_text())
    if cell["recipe"] != to_dict(_cell_recipe(recipe, variant, seed)):
        raise ConfigError(f"{path} was run with other settings; choose another folder (--out)")
    return cell


def run_cell(recipe: Recipe, file: str, threads: int | None) -> dict[str, Any]:
    """Train one cell, beside ``file``; a run that was cut off there goes on from its last checkpoint."""
    from ecanet import training

    if threads is not None:
        torch.set_num_threads(threads)
    place = Path(file).with_suffix("")
    try:
        report = training.run(recipe, folder=place, resume=(place / "recipe.json").exists(), quiet=True)
    except EcanetError as error:
        raise type(error)(f"{place.name}: {error}") from error
    return {
        "recipe": to_dict(recipe),
        "top1": report.metrics["top1"],
        "metrics": report.metrics,
        "seconds": report.seconds,
        "parameters": report.parameters,
        "environment": report.environment,
    }


def _run_here(todo: Sequence[tuple[str, Recipe]], threads: int | None, say: Callable[[str], None]) -> None:
    from rich.progress import track

    for file, recipe in track(todo, description="cells", disable=not todo):
        _keep(file, run_cell(recipe, file, threads), say)


def _run_on_ray(todo: Sequence[tuple[str, Recipe]], threads: int, say: Callable[[str], None]) -> None:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError("Ray is not installed: pip install 'ecanet[cluster]', or leave out --on ray") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run_cell)
    running = {remote.remote(recipe, str(Path(file).absolute()), threads): file for file, recipe in todo}
    while running:
        done, _ = ray.wait(list(running))
        try:
            _keep(running.pop(done[0]), ray.get(done[0]), say)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None


def _keep(file: str, cell: dict[str, Any], say: Callable[[str], None]) -> None:
    write_file(Path(file), json.dumps(cell, indent=2))
    say(f"{Path(file).stem}: top-1 {cell['top1']:.2f} in {cell['seconds']:.0f} s")


# what came out


def compare(rows: Sequence[Variant], cells: dict[tuple[str, int], dict[str, Any]], seeds: int) -> list[Line]:
    """Mean and interval of each row, and its paired difference to the first row, none."""
    top1 = {row.name: {s: float(cells[row.name, s]["top1"]) for s in range(seeds)} for row in rows}
    lines = []
    for row in rows:
        mine, plain = top1[row.name], top1["none"]
        pairs = [mine[s] - plain[s] for s in range(seeds)]
        strict = estimate(pairs, level=1 - 0.05 / max(1, len(rows) - 1))
        lines.append(
            Line(
                variant=row,
                top1=estimate(list(mine.values())),
                difference=None if row.name == "none" else estimate(pairs),
                beyond_noise=None if row.name == "none" or strict.half is None else abs(strict.mean) > strict.half,
                seconds=statistics.mean(float(cells[row.name, s]["seconds"]) for s in range(seeds)),
                by_seed=mine,
            )
        )
    return lines


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of ``values`` and half the width of its t interval.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3)
    (2.0, 2.484)
    """
    from scipy import stats

    mean = statistics.mean(values)
    if len(values) < 2:
        return Estimate(mean=mean, half=None)
    t = stats.t.ppf((1 + level) / 2, len(values) - 1)
    return Estimate(mean=mean, half=float(t * statistics.stdev(values) / len(values) ** 0.5))
