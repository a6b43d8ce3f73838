"""Measure what lossless attach is worth: plain ResNet-20s, pretrained on real images, are fine-tuned in four ways.

Fashion-MNIST's 60,000 training images are split in two halves by a fixed random order. Three plain networks (one for
each seed) are pretrained for three epochs on the first half. From each checkpoint five arms are fine-tuned for one
epoch on the second half, at three learning rates, with the same budget, schedule and order of images:

    plain         no attention
    eca           ECA attached losslessly
    eca-random    ECA attached with its usual random gates (preserve=False)
    eca-random-recalibrated    the same; then batch-norm statistics are measured again, without labels or training
    se            SE (reduction 4) attached losslessly

Accuracy is measured on all 10,000 test images: before fine-tuning, at three steps during it, and at the end. A run
takes about an hour and a half on one core. An interrupted run continues where it stopped; tables and pictures say how
many seeds they have.

    python benchmarks/attach_finetune.py            # run the missing cells and write the JSON file
    python benchmarks/attach_finetune.py --plot     # make picture and table from the JSON file
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import ecanet
from ecanet.data.sources import SMALL_SETS, load_fashion_mnist
from ecanet.report import environment, write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attach-finetune.json"
PICTURE = ROOT / "docs" / "attach-finetune.png"
TABLE = ROOT / "docs" / "attach-finetune.md"
CHECKPOINTS = ROOT / "runs" / "attach-finetune"

SETTINGS: dict[str, Any] = {
    "network": "resnet20",
    "seeds": [0, 1, 2],
    "batch_size": 128,
    "pretrain": {"images": 30_000, "epochs": 3, "learning_rate": 0.1},
    "finetune": {"images": 30_000, "epochs": 1, "learning_rates": [0.005, 0.02, 0.08]},
    "recalibrate": {"images": 2_560},
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4 on everything, cosine to 0, no augmentation",
    "evaluated_at": [0.0, 0.1, 0.25, 0.5, 1.0],
}

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "eca": {"attention": "eca"},
    "eca-random": {"attention": "eca", "preserve": False},
    "eca-random-recalibrated": {"attention": "eca", "preserve": False},
    "se": {"attention": "se", "reduction": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="make picture and table from the JSON file")
    if parser.parse_args().plot:
        cells = json.loads(RESULTS.read_text())["cells"]
        draw(cells)
        write_file(TABLE, make_table(cells))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": SETTINGS, "cells": []}
    if results["settings"] != SETTINGS:
        raise SystemExit(f"{RESULTS} was made with other settings; move it away to begin again")
    done = {(cell["seed"], cell["rate"], cell["arm"]) for cell in results["cells"]}
    data = Data()
    for seed in SETTINGS["seeds"]:
        start = load_or_pretrain(seed, data)
        for rate, arm in product(SETTINGS["finetune"]["learning_rates"], ARMS):
            if (seed, rate, arm) not in done:
                results["cells"].append(fine_tune(seed, rate, arm, start, data))
                command = "OMP_NUM_THREADS=1 python benchmarks/attach_finetune.py"
                results["environment"] = {**environment(), "threads": torch.get_num_threads(), "command": command}
                write_file(RESULTS, json.dumps(results, indent=1) + "\n")


class Data:
    """Normalised images and labels: two halves for training, and the test set."""

    def __init__(self) -> None:
        spec = SMALL_SETS["fashion-mnist"].spec
        images, labels = load_fashion_mnist(None, True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.halves = [(spec.normalize(images[part]), labels[part]) for part in order.chunk(2)]
        images, labels = load_fashion_mnist(None, False)
        self.test = spec.normalize(images), labels


def load_or_pretrain(seed: int, data: Data) -> dict[str, Tensor]:
    """Return the state dict of the plain network from which all arms of ``seed`` start."""
    path = CHECKPOINTS / f"pretrained-{seed}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        model = make_plain_network()
        train(model, data.halves[0], SETTINGS["pretrain"], SETTINGS["pretrain"]["learning_rate"], seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        accuracy = compute_accuracy(compute_logits(model, data.test[0]), data.test[1])
        print(f"seed {seed}: pretrained, {100 * accuracy:.2f} %", flush=True)
    return torch.load(path, weights_only=True)


def fine_tune(seed: int, rate: float, arm: str, start: dict[str, Tensor], data: Data) -> dict[str, Any]:
    """Return one cell: the accuracy of ``arm`` before, during and after fine-tuning at the learning rate ``rate``."""
    images, labels = data.test
    model = make_plain_network()
    model.load_state_dict(start)
    before = compute_logits(model, images)
    plain_parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(seed)
    if ARMS[arm] is not None:
        ecanet.attach(model, **ARMS[arm], example=images[:2])
    if arm.endswith("-recalibrated"):
        update_bn(data.halves[1][0][: SETTINGS["recalibrate"]["images"]].split(SETTINGS["batch_size"]), model)
    attached = compute_logits(model, images)
    steps = SETTINGS["finetune"]["images"] // SETTINGS["batch_size"]
    points = [{"step": 0, "accuracy": compute_accuracy(attached, labels)}]
    at = {round(share * steps) for share in SETTINGS["evaluated_at"]} - {0}

    def evaluate(step: int) -> None:
        if step in at:
            points.append({"step": step, "accuracy": compute_accuracy(compute_logits(model, images), labels)})

    started = time.perf_counter()
    loss = train(model, data.halves[1], SETTINGS["finetune"], rate, seed + 1000, evaluate)
    cell = {
        "seed": seed,
        "rate": rate,
        "arm": arm,
        "added_parameters": sum(p.numel() for p in model.parameters()) - plain_parameters,
        "outputs_unchanged_by_attach": torch.equal(before, attached),
        "points": points,
        "last_losses": loss,
        "seconds": time.perf_counter() - started,
        "date": environment()["date"],
    }
    print(f"seed {seed} rate {rate} {arm}: " + " ".join(f"{100 * p['accuracy']:.2f}" for p in points), flush=True)
    return cell


def make_plain_network() -> nn.Module:
    """Return a ResNet-20 without attention for grey images."""
    return ecanet.create_model(SETTINGS["network"], attention="none", in_channels=1, num_classes=10)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    budget: dict[str, Any],
    rate: float,
    seed: int,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Train on images and labels, and return the mean loss of the last 20 steps.

    ``after_step`` is called after every step with the number of steps so far.
    """
    images, labels = data
    batch = SETTINGS["batch_size"]
    steps = budget["epochs"] * (budget["images"] // batch)
    model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    while len(losses) < steps:
        for chosen in torch.randperm(len(images), generator=generator)[: len(images) // batch * batch].split(batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(len(losses))
    return mean(losses[-20:])


@torch.no_grad()
def compute_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, classes) for ``images`` in evaluation mode; the model's mode is restored afterwards."""
    training = model.training
    model.eval()
    outputs = torch.cat([model(part) for part in images.split(500)])
    model.train(training)
    return outputs


def compute_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the share of ``outputs`` whose largest logit is that of the label."""
    return (outputs.argmax(1) == labels).double().mean().item()


def select(cells: list[dict[str, Any]], rate: float, arm: str) -> list[dict[str, Any]]:
    """Return the cells of ``arm`` at the learning rate ``rate``, one for each seed."""
    return [cell for cell in cells if (cell["rate"], cell["arm"]) == (rate, arm)]


def compute_difference(cells: list[dict[str, Any]], rate: float, arm: str) -> str:
    """Return the mean difference of ``arm`` to plain at the end, in points of accuracy.

    Where there are several seeds, half of the 95 % interval follows. It is that of a paired t-test: differences are
    taken within each seed.
    """
    from scipy.stats import t

    plain = {cell["seed"]: cell["points"][-1]["accuracy"] for cell in select(cells, rate, "plain")}
    mine = [cell for cell in select(cells, rate, arm) if cell["seed"] in plain]
    differences = [100 * (cell["points"][-1]["accuracy"] - plain[cell["seed"]]) for cell in mine]
    n = len(differences)
    if n < 2:
        return "".join(f"{difference:+.2f}" for difference in differences)
    return f"{mean(differences):+.2f} ± {float(t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5:.2f}"


def make_table(cells: list[dict[str, Any]]) -> str:
    """Return a Markdown table of accuracy in percent, as means over the seeds that were run."""
    steps = [p["step"] for p in cells[0]["points"]]
    head = ["rate", "arm", "parameters added", "seeds", "before", *(f"step {s}" for s in steps[1:-1]), "end"]
    lines = ["| " + " | ".join([*head, "end − plain (95 %)"]) + " |", "|" + "---|" * (len(head) + 1)]
    for rate, arm in product(SETTINGS["finetune"]["learning_rates"], ARMS):
        mine = select(cells, rate, arm)
        if mine:
            means = [f"{100 * mean(c['points'][i]['accuracy'] for c in mine):.2f}" for i in range(len(steps))]
            difference = "" if arm == "plain" else compute_difference(cells, rate, arm)
            row = [f"{rate:g}", arm, str(mine[0]["added_parameters"]), str(len(mine)), *means, difference]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw(cells: list[dict[str, Any]]) -> None:
    """Draw accuracy against steps, a column for each rate: thin lines are seeds, thick lines their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rates = [rate for rate in SETTINGS["finetune"]["learning_rates"] if select(cells, rate, "plain")]
    figure, grid = plt.subplots(
        2, len(rates), figsize=(5 * len(rates), 7), sharey="row", squeeze=False, constrained_layout=True
    )
    colours, styles = ("0.3", "tab:blue", "tab:red", "tab:orange", "tab:green"), ("-", "-", "--", "-.", ":")
    for column, rate in zip(grid.T, rates, strict=True):
        for arm, colour, style in zip(ARMS, colours, styles, strict=True):
            mine = select(cells, rate, arm)
            curves = [[100 * p["accuracy"] for p in cell["points"]] for cell in mine]
            steps = [p["step"] for p in mine[0]["points"]] if mine else []
            means = [mean(values) for values in zip(*curves, strict=True)]
            for axes in column:
                for curve in curves:
                    axes.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.5)
                if mine:
                    axes.plot(steps, means, style, color=colour, linewidth=2, label=f"{arm} ({len(mine)})")
        column[0].set_title(f"learning rate {rate:g}")
        column[0].legend(title="arm (seeds)", fontsize=9)
        column[1].set(ylim=(85, 92), xlabel="fine-tuning step (batch 128)")
    grid[0][0].set_ylabel("test accuracy, %")
    grid[1][0].set_ylabel("the same, enlarged")
    figure.suptitle("ResNet-20 on Fashion-MNIST:\nattention put into a pretrained network")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
