"""Train Mask R-CNN, Faster R-CNN and RetinaNet on generated scenes, with ECA and without attention, from scratch.

    OMP_NUM_THREADS=1 python benchmarks/scenes.py        # hours on a CPU; an interrupted run continues

Each run is that of ``ecanet train scenes --model MODEL --attention ATTENTION --seed SEED``, for RetinaNet with
``--epochs 12``. It has its own folder in ``runs``, and a finished run is not made again. The figures are written to
``benchmarks/results/scenes.json`` and, as a table, to the terminal. ``--missing skip`` trains nothing and lists the
finished runs. ``--picture FILE`` draws the detections of the first run on the first six held-out scenes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torchvision

from ecanet import recipes, training
from ecanet.data.boxes import load_boxes
from ecanet.data.pictures import read_image
from ecanet.errors import DataError
from ecanet.recipes import Recipe, to_dict
from ecanet.report import Report, write_file
from ecanet.training.detections import detect

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
"""Epochs that replace the recipe's. RetinaNet has no second stage: an epoch takes half the time, and it learns less."""

RESULT = Path(__file__).parent / "results" / "scenes.json"
COLUMNS = ("AP50", "AP", "APS", "APM", "APL", "mask_AP50", "mask_AP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--missing", choices=("train", "skip"), default="train", help="train the missing runs, or skip them"
    )
    parser.add_argument("--picture", type=Path, help="only draw detections, into this file")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(find_folder(*RUNS[0]), arguments.picture)
        return
    rows = []
    for model, attention, seed in RUNS:
        folder = find_folder(model, attention, seed)
        recipe = recipes.find("scenes")
        recipe = recipe.but(
            model=recipe.model.but(name=model, attention=attention),
            epochs=EPOCHS.get(model, recipe.epochs),
            seed=seed,
        )
        report = read_finished(folder, recipe)
        if report is None and arguments.missing == "train":
            report = training.run(recipe, folder=folder, resume=(folder / "recipe.json").exists(), quiet=True)
        if report is not None:
            rows.append({"model": model, "attention": attention, "seed": seed, **select_figures(report)})
            print(format_row(rows[-1]), flush=True)
    write_file(RESULT, json.dumps({"recipe": to_dict(recipes.find("scenes")), "runs": rows}, indent=1) + "\n")


def find_folder(model: str, attention: str, seed: int) -> Path:
    return Path("runs", f"scenes-{model}-{attention}-{seed}")


def draw(run: Path, file: Path, columns: int = 3, rows: int = 2) -> None:
    """Draw the detections of ``run`` on the first held-out scenes, side by side."""
    task = training.restore(str(run))
    held_out = load_boxes(task.recipe.data, train=False).held_out.annotations.pictures[: columns * rows]
    with tempfile.TemporaryDirectory() as folder:
        found = detect(task, [scene.path for scene in held_out], folder)
        drawn = [read_image(answer["picture"], 3) for answer in found if not isinstance(answer, DataError)]
    whole = torchvision.utils.make_grid(torch.stack(drawn), nrow=columns, padding=4, pad_value=255)
    torchvision.io.write_jpeg(whole, str(file), quality=80)


def read_finished(folder: Path, recipe: Recipe) -> Report | None:
    """Return the report of the run in ``folder``, None if it is not finished."""
    if not (folder / "metrics.json").exists():
        return None
    report = Report.read(folder)
    if report.recipe != recipe:
        raise SystemExit(f"{folder} holds a run of another recipe; move it away")
    return report


def select_figures(report: Report) -> dict[str, object]:
    return {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "epochs": report.history,
        "environment": report.environment,
    }


def format_row(row: dict) -> str:
    last = row["epochs"][-1]
    values = [f"{last[name]:.3f}" if name in last else "" for name in COLUMNS]
    heads = [row["model"], row["attention"], str(row["seed"]), f"{row['parameters']:,}"]
    return "| " + " | ".join([*heads, *values, f"{row['seconds'] / 60:.1f}"]) + " |"


if __name__ == "__main__":
    main()
