"""Draw the pictures of the published ablations: `python docs/draw_ablations.py` writes docs/ablation-*.png.

They come from benchmarks/results/ablation-*.json, by the code that draws a new ablation.
"""

import json
from pathlib import Path
from typing import Any

from ecanet import recipes
from ecanet.report import figures
from ecanet.studies.ablate.comparison import compare
from ecanet.studies.ablate.figures import draw
from ecanet.studies.ablate.grid import Ablation
from ecanet.studies.ablate.variants import plan

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"

RECIPES = {"ablation-fashion-mnist": "fashion", "ablation-glyphs": "glyphs"}
"""The recipe of each published ablation whose picture the documentation shows."""


def read_ablation(name: str) -> Ablation:
    """Return the published ablation ``name`` from its scores by variant and seed.

    Raises:
        ValueError: a variant is significant here and not in the file, or the other way round.
    """
    published: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    rows, seeds = published["rows"], published["seeds"]
    recipe = recipes.find(RECIPES[name])
    recipe = recipe.but(model=recipe.model.but(name=rows[0]["model"]["name"]))
    names = [row["variant"] for row in rows]
    planned = {one.name: one for one in plan(recipe, [name for name in names if name != "none"], lambda line: None)}
    measured = {
        (row["variant"], int(seed)): {"metrics": {"top1": score}, "seconds": row["seconds"]}
        for row in rows
        for seed, score in row["top1_by_seed"].items()
    }
    results = compare([planned[name] for name in names], measured, len(seeds))
    for result, row in zip(results, rows, strict=True):
        if (result.variant.name, bool(result.significant)) != (row["variant"], bool(row["significant"])):
            raise ValueError(f"{name}: {row['variant']} is not what the file says")
    return Ablation(recipe=recipe, folder=Path(), seeds=seeds, results=results)


if __name__ == "__main__":
    for name in RECIPES:
        (HERE / f"{name}.png").write_bytes(figures.to_png(draw(read_ablation(name))))
