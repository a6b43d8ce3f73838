"""Train every variant with every seed on one recipe, and compare the results.

A cell of the grid is one variant with one seed. The result of each finished cell is a file of its own, which is
written whole or not at all. So the same command resumes an ablation that was killed.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ecanet import progress
from ecanet.errors import ConfigError, EcanetError, check_positive_int, summarize
from ecanet.recipes import Recipe, from_dict, read_json, to_dict
from ecanet.report import write_file
from ecanet.studies.ablate.comparison import Measurement, Result, compare
from ecanet.studies.ablate.metrics import Metric, find_metric
from ecanet.studies.ablate.variants import VARIANTS, Variant, plan
from ecanet.training import complete

__all__ = ["Ablation", "run", "run_cell"]


class Cell(Measurement):
    """The content of a finished cell's file."""

    recipe: dict[str, object]
    parameters: int
    environment: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """The recipe and the seeds of an ablation, and the result of each variant, the plain network's first."""

    recipe: Recipe
    folder: Path
    seeds: list[int]
    results: list[Result]

    @property
    def metric(self) -> Metric:
        """The metric that is compared: the task's monitor."""
        return find_metric(self.recipe)


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
    """Run every variant with the seeds 0, 1, … and compare them; cells finished in ``folder`` do not run again.

    Args:
        recipe: data, network and settings of every run. Each variant replaces the attention.
        folder: where cells and runs are kept. It belongs to this recipe.
        variants: names from `VARIANTS`; the plain network "none" is always among them. Variants that are the same
            network become one row. ``larger=NETWORK`` names the larger control.
        seeds: number of runs of each variant.
        on: "here" runs one cell after the other; "ray" runs several at a time on Ray (extra ``cluster``).
        threads: CPU threads of one cell. The last digits of the results depend on it, so keep it when resuming.
        say: is called with a line about each finished cell.

    Raises:
        ConfigError: a variant does not exist, or ``folder`` holds an ablation of another recipe.
        DataError: the data are missing or broken.
    """
    seeds = check_positive_int("seeds", seeds)
    if recipe.seed:
        raise ConfigError(f"an ablation runs the seeds 0, 1, …: leave out seed={recipe.seed} and give their number")
    folder = Path(folder)
    recipe = complete(recipe, trusted=True)
    rows = plan(recipe, variants, say)
    _claim_folder(folder, recipe)
    grid = [(variant, seed) for seed in range(seeds) for variant in rows]
    missing = [(variant, seed) for variant, seed in grid if not _read_cell(folder, variant, seed)]
    todo = [(_cell_file(folder, v, s), _cell_recipe(v, s)) for v, s in missing]
    say(f"{len(rows)} networks x {seeds} seeds: {len(grid)} cells, {len(grid) - len(todo)} of them finished")
    match on:
        case "here":
            _run_here(todo, threads, say)
        case "ray":
            _run_on_ray(todo, threads or 1, say)
        case _:
            raise ConfigError(f"cannot run on {on!r}; choose 'here' or 'ray'")
    cells = {(v.name, s): cell for v, s in grid if (cell := _read_cell(folder, v, s))}
    results = compare(rows, cells, seeds, find_metric(recipe))
    return Ablation(recipe=recipe, folder=folder, seeds=list(range(seeds)), results=results)


# files


def _claim_folder(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into ``folder``; raise ConfigError if the folder already belongs to another recipe."""
    path = folder / "recipe.json"
    recipe = recipe.but(seed=0)
    if not path.exists():
        write_file(path, json.dumps(to_dict(recipe), indent=2))
    elif from_dict(Recipe, _read_own(path)) != recipe:
        raise ConfigError(f"{folder} holds an ablation of another recipe; choose another folder (--out)")


def _read_own(path: Path) -> Mapping[str, object]:
    """Return the content of a file that an ablation has written; raise ConfigError if it is something else now."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({summarize(error)}); remove it, so that it is made again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a file of an ablation; remove it, so that it is made again")
    return cast(dict[str, object], content)


def _cell_recipe(variant: Variant, seed: int) -> Recipe:
    return variant.recipe.but(seed=seed)


def _cell_file(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "cells" / f"{variant.name}-seed{seed}.json"


def _read_cell(folder: Path, variant: Variant, seed: int) -> Cell | None:
    """Return the cell if it is finished; raise ConfigError if its file is the result of another recipe."""
    path = _cell_file(folder, variant, seed)
    if not path.exists():
        return None
    cell = cast(Cell, _read_own(path))
    if not set(Cell.__annotations__) <= set(cell) or cell["recipe"] != to_dict(_cell_recipe(variant, seed)):
        raise ConfigError(f"{path} was run with other settings; choose another folder (--out)")
    return cell


def _save_cell(path: Path, cell: Cell, metric: Metric, say: Callable[[str], None]) -> None:
    write_file(path, json.dumps(cell, indent=2))
    score = cell["metrics"][metric.name]
    say(f"{path.stem}: {metric.label} {score:.{metric.digits}f} in {cell['seconds']:.0f} s")


# runs


def run_cell(recipe: Recipe, path: Path, threads: int | None) -> Cell:
    """Train one cell in a run directory beside its file ``path``; an interrupted run there is resumed."""
    from ecanet import training

    if threads is not None:
        torch.set_num_threads(threads)
    run_dir = path.with_suffix("")
    try:
        report = training.run(recipe, folder=run_dir, resume=(run_dir / "recipe.json").exists(), quiet=True)
    except EcanetError as error:
        raise type(error)(f"{run_dir.name}: {error}") from error
    return {
        "recipe": to_dict(recipe),
        "metrics": report.metrics,
        "seconds": report.seconds,
        "parameters": report.parameters,
        "environment": report.environment,
    }


def _run_here(todo: Sequence[tuple[Path, Recipe]], threads: int | None, say: Callable[[str], None]) -> None:
    for path, recipe in progress.track(todo, "runs"):
        _save_cell(path, run_cell(recipe, path, threads), find_metric(recipe), say)


def _run_on_ray(todo: Sequence[tuple[Path, Recipe]], threads: int, say: Callable[[str], None]) -> None:
    try:
        ray = cast(Any, importlib.import_module("ray"))  # an optional package without type annotations
    except ModuleNotFoundError as error:
        raise ConfigError("Ray is not installed: pip install 'ecanet[cluster]', or leave out --on ray") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run_cell)
    # Workers have their own current directory, so they get absolute paths.
    running: dict[object, tuple[Path, Recipe]] = {
        remote.remote(recipe, path.absolute(), threads): (path, recipe) for path, recipe in todo
    }
    while running:
        done: list[object] = ray.wait(list(running))[0]
        path, recipe = running.pop(done[0])
        try:
            _save_cell(path, ray.get(done[0]), find_metric(recipe), say)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
