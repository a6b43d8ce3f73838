"""Measure what lossless attach is worth: plain ResNet-20s, pretrained on real images, are fine-tuned in four ways.

Fashion-MNIST's 60,000 training images are split in two halves by a fixed random order. Three plain networks (one for
each seed) are pretrained for three epochs on the first half. From each checkpoint four arms are fine-tuned for one
epoch on the second half, with the same budget, schedule and order of images:

    plain         no attention
    eca           ECA attached losslessly
    eca-random    ECA attached with its usual random gates (preserve=False)
    se            SE (reduction 4) attached losslessly

Accuracy is measured on all 10,000 test images: before fine-tuning, at three steps during it, and at the end. A run
takes about half an hour on one core. An interrupted run continues where it stopped.

    python benchmarks/attach_finetune.py            # run the missing cells and write the JSON file
    python benchmarks/attach_finetune.py --plot     # make picture and table from the JSON file
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    "finetune": {"images": 30_000, "epochs": 1, "learning_rate": 0.02},
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4 on everything, cosine to 0, no augmentation",
    "evaluated_at": [0.0, 0.1, 0.25, 0.5, 1.0],
}

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "eca": {"attention": "eca"},
    "eca-random": {"attention": "eca", "preserve": False},
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
    done = {(cell["seed"], cell["arm"]) for cell in results["cells"]}
    data = Data()
    for seed in SETTINGS["seeds"]:
        start = load_or_pretrain(seed, data)
        for arm in ARMS:
            if (seed, arm) not in done:
                results["cells"].append(fine_tune(seed, arm, start, data))
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
        train(model, data.halves[0], SETTINGS["pretrain"], seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        accuracy = compute_accuracy(compute_logits(model, data.test[0]), data.test[1])
        print(f"seed {seed}: pretrained, {100 * accuracy:.2f} %", flush=True)
    return torch.load(path, weights_only=True)


def fine_tune(seed: int, arm: str, start: dict[str, Tensor], data: Data) -> dict[str, Any]:
    """Return one cell: the accuracy of ``arm`` before, during and after fine-tuning."""
    images, labels = data.test
    model = make_plain_network()
    model.load_state_dict(start)
    before = compute_logits(model, images)
    plain_parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(seed)
    if ARMS[arm] is not None:
        ecanet.attach(model, **ARMS[arm], example=images[:2])
    attached = compute_logits(model, images)
    steps = SETTINGS["finetune"]["images"] // SETTINGS["batch_size"]
    points = [{"step": 0, "accuracy": compute_accuracy(attached, labels)}]
    at = {round(share * steps) for share in SETTINGS["evaluated_at"]} - {0}

    def evaluate(step: int) -> None:
        if step in at:
            points.append({"step": step, "accuracy": compute_accuracy(compute_logits(model, images), labels)})

    started = time.perf_counter()
    loss = train(model, data.halves[1], SETTINGS["finetune"], seed + 1000, evaluate)
    cell = {
        "seed": seed,
        "arm": arm,
        "added_parameters": sum(p.numel() for p in model.parameters()) - plain_parameters,
        "outputs_unchanged_by_attach": torch.equal(before, attached),
        "points": points,
        "last_losses": loss,
        "seconds": time.perf_counter() - started,
    }
    print(f"seed {seed} {arm}: " + " ".join(f"{100 * p['accuracy']:.2f}" for p in points), flush=True)
    return cell


def make_plain_network() -> nn.Module:
    """Return a ResNet-20 without attention for grey images."""
    return ecanet.create_model(SETTINGS["network"], attention="none", in_channels=1, num_classes=10)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    budget: dict[str, Any],
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
    optimizer = torch.optim.SGD(
        model.parameters(), budget["learning_rate"], momentum=0.9, nesterov=True, weight_decay=5e-4
    )
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


def compute_difference(cells: list[dict[str, Any]], arm: str, point: int) -> tuple[float, float]:
    """Return the mean difference of ``arm`` to plain in points of accuracy, and half of its 95 % interval.

    The interval is that of a paired t-test: differences are taken within each seed.
    """
    from scipy.stats import t

    curves = {(c["seed"], c["arm"]): c["points"][point]["accuracy"] for c in cells}
    differences = [100 * (curves[seed, arm] - curves[seed, "plain"]) for seed in SETTINGS["seeds"]]
    n = len(differences)
    return mean(differences), float(t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5


def make_table(cells: list[dict[str, Any]]) -> str:
    """Return a Markdown table of accuracy in percent, as means over the seeds."""
    steps = [p["step"] for p in cells[0]["points"]]
    head = ["arm", "parameters added", "before", *(f"step {s}" for s in steps[1:-1]), "end", "end − plain (95 %)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in ARMS:
        mine = [c for c in cells if c["arm"] == arm]
        means = [f"{100 * mean(c['points'][i]['accuracy'] for c in mine):.2f}" for i in range(len(steps))]
        difference = "" if arm == "plain" else "{:+.2f} ± {:.2f}".format(*compute_difference(cells, arm, -1))
        lines.append("| " + " | ".join([arm, str(mine[0]["added_parameters"]), *means, difference]) + " |")
    return "\n".join(lines) + "\n"


def draw(cells: list[dict[str, Any]]) -> None:
    """Draw accuracy against steps: thin lines are seeds, thick lines their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    styles = zip(ARMS, ("0.3", "tab:blue", "tab:red", "tab:green"), ("-", "-", "--", ":"), strict=True)
    for arm, colour, style in styles:
        curves = [[100 * p["accuracy"] for p in c["points"]] for c in cells if c["arm"] == arm]
        steps = [p["step"] for p in cells[0]["points"]]
        for axes in panels:
            for curve in curves:
                axes.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.5)
            axes.plot(steps, [mean(c) for c in zip(*curves, strict=True)], style, color=colour, linewidth=2, label=arm)
    for axes in panels:
        axes.set(xlabel="fine-tuning step (batch 128)", ylabel="test accuracy, %")
    panels[0].legend()
    panels[0].set_title("from before fine-tuning", fontsize=10)
    panels[1].set(ylim=(85, 92))
    panels[1].set_title("the same, enlarged", fontsize=10)
    figure.suptitle("ResNet-20 on Fashion-MNIST: attention attached to a pretrained network, three seeds", fontsize=11)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
