"""Mask R-CNN, Faster R-CNN and RetinaNet on generated scenes, with ECA and plain, from scratch.

    OMP_NUM_THREADS=1 python benchmarks/scenes.py        # hours on a CPU; goes on where it was

Each run is what ``ecanet train scenes --model MODEL --attention ATTENTION --seed SEED`` does, RetinaNet's with
``--epochs 12``, in a folder of its own below ``runs``. Finished ones are read and not made again. The figures go to
``benchmarks/results/scenes.json`` and, as a table, to the terminal; ``--missing skip`` trains nothing and lists what is
finished.
"""

import argparse
import json
from pathlib import Path

from ecanet import recipes, train
from ecanet.config import Recipe, to_dict
from ecanet.report import Report, write_file

RUNS = [
    ("mask_rcnn", "eca", 0),
    ("mask_rcnn", "eca", 1),
    ("mask_rcnn", "none", 0),
    ("mask_rcnn", "none", 1),
    ("faster_rcnn", "eca", 0),
    ("faster_rcnn", "none", 0),
    ("retinanet", "eca", 0),
    ("retinanet", "none", 0),
]
EPOCHS = {"retinanet": 12}
"""Instead of the recipe's: it has no second stage, takes half the time an epoch, and learns more slowly."""

RESULT = Path(__file__).parent / "results" / "scenes.json"
COLUMNS = ("AP50", "AP", "APS", "APM", "APL", "mask_AP50", "mask_AP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--missing", choices=("train", "skip"), default="train", help="what to do with missing runs")
    missing = parser.parse_args().missing
    rows = []
    for model, attention, seed in RUNS:
        folder = Path("runs", f"scenes-{model}-{attention}-{seed}")
        recipe = recipes.find("scenes")
        recipe = recipe.but(
            model=recipe.model.but(name=model, attention=attention),
            epochs=EPOCHS.get(model, recipe.epochs),
            seed=seed,
        )
        report = finished(folder, recipe)
        if report is None and missing == "train":
            report = train.run(recipe, folder=folder, resume=(folder / "recipe.json").exists(), quiet=True)
        if report is not None:
            rows.append({"model": model, "attention": attention, "seed": seed, **figures(report)})
            print(line(rows[-1]), flush=True)
    write_file(RESULT, json.dumps({"recipe": to_dict(recipes.find("scenes")), "runs": rows}, indent=1) + "\n")


def finished(folder: Path, recipe: Recipe) -> Report | None:
    """The run's report, if it was made to its end with this recipe."""
    if not (folder / "metrics.json").exists():
        return None
    report = Report.read(folder)
    if report.recipe != recipe:
        raise SystemExit(f"{folder} was run with another recipe; move it away")
    return report


def figures(report: Report) -> dict[str, object]:
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "epochs": report.history,
        "environment": report.environment,
    }


def line(row: dict) -> str:
    last = row["epochs"][-1]
    values = [f"{last[name]:.3f}" if name in last else "" for name in COLUMNS]
    heads = [row["model"], row["attention"], str(row["seed"]), f"{row['parameters']:,}"]
    return "| " + " | ".join([*heads, *values, f"{row['seconds'] / 60:.1f}"]) + " |"


if __name__ == "__main__":
    main()
