"""Fine-tune MobileNetV2's ImageNet weights on Fashion-MNIST, with and without gates, from the same state.

1. The plain network learns the task: its head begins at zero, the learning rate is warmed up, gradients are clipped.
2. Each arm starts from that state and is fine-tuned on other images, at each of the learning rates. All of them are
   recorded. The one that counts is chosen for each arm and seed on held-out training images, never on test images.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torchvision
from pictures import make_network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import ecanet
from ecanet.attention import compute_image_weights
from ecanet.data.sources import load_fashion_mnist

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "eca": {"attention": "eca"},
    "eca-gates-x10": {"attention": "eca"},
    "eca-gates-x50": {"attention": "eca"},
    "eca-random": {"attention": "eca", "preserve": False},
    "eca-random-recalibrated": {"attention": "eca", "preserve": False},
    "se": {"attention": "se"},
}
SETTINGS: dict[str, Any] = {
    "data": "fashion-mnist",
    "size": 64,
    "batch_size": 64,
    "task": {"images": [0, 25_000], "steps": 250, "learning_rate": 0.03},
    "finetune": {"images": [25_000, 50_000], "steps": 100, "learning_rates": [0.01, 0.003, 0.03]},
    "held_out": [50_000, 51_000],
    "test": 1_000,
    "recalibrate": 640,
    "evaluated_at": [25, 50, 100],
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 1e-4 (gates of their own rate: none), 10 steps of warm-up, "
    "cosine to 0, gradients clipped to a norm of 5",
}
QUICK: dict[str, Any] = SETTINGS | {
    "size": 32,
    "batch_size": 8,
    "task": {"images": [0, 40], "steps": 2, "learning_rate": 0.03},
    "finetune": {"images": [0, 40], "steps": 3, "learning_rates": [0.01]},
    "held_out": [40, 50],
    "test": 20,
    "recalibrate": 16,
    "evaluated_at": [1, 3],
}


class Data:
    """Fashion-MNIST as three equal colour channels in ImageNet's normalisation, enlarged batch by batch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        see = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in (see.mean, see.std))
        self.size = settings["size"]
        self.images, self.labels = load_fashion_mnist(None, True)
        images, labels = load_fashion_mnist(None, False)
        self.test = images[: settings["test"]], labels[: settings["test"]]
        self.held_out = tuple(part[slice(*settings["held_out"])] for part in (self.images, self.labels))

    def prepare(self, images: Tensor) -> Tensor:
        """Return grey images (N, 1, 28, 28) of bytes as the network takes them (N, 3, size, size)."""
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return x.contiguous(memory_format=torch.channels_last)


def learn_task(weights: Path, data: Data, settings: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Return the state dict of the plain network after it has learned the task."""
    torch.manual_seed(seed)
    model = make_network(weights)
    head = nn.Linear(1280, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.classifier[1] = head
    task = settings["task"]
    optimizer = make_optimizer(model, "plain", task["learning_rate"])
    train(model, optimizer, data, settings, task, seed)
    return model.state_dict()


def fine_tune(seed: int, arm: str, rate: float, start: dict[str, Tensor], data: Data, settings: dict[str, Any]) -> Any:
    """Return one cell: accuracies of ``arm`` before, during and after fine-tuning, and how far its gates moved."""
    model = torchvision.models.mobilenet_v2(num_classes=10)
    model.load_state_dict(start)
    model.to(memory_format=torch.channels_last).eval()
    images, labels = data.test
    before = compute_logits(model, data, images[:250])
    plain_parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(seed)
    if ARMS[arm] is not None:
        ecanet.attach(model, **ARMS[arm], example=data.prepare(images[:2]))
    part = settings["finetune"]
    if arm.endswith("-recalibrated"):
        unlabelled = data.images[slice(*part["images"])][: settings["recalibrate"]]
        update_bn((data.prepare(batch) for batch in unlabelled.split(settings["batch_size"])), model)
    logits = compute_logits(model, data, images)
    points = [{"step": 0, "accuracy": compute_accuracy(logits, labels)}]

    def evaluate(step: int) -> None:
        if step in settings["evaluated_at"]:
            accuracy = compute_accuracy(compute_logits(model, data, images), labels)
            points.append({"step": step, "accuracy": accuracy})

    started = time.perf_counter()
    loss = train(model, make_optimizer(model, arm, rate), data, settings, part, seed + 1000, evaluate)
    held_images, held_labels = data.held_out
    return {
        "seed": seed,
        "arm": arm,
        "rate": rate,
        "added_parameters": sum(p.numel() for p in model.parameters()) - plain_parameters,
        "outputs_unchanged_by_attach": torch.equal(before, logits[:250]),
        "points": points,
        "held_out": compute_accuracy(compute_logits(model, data, held_images), held_labels),
        "last_losses": loss,
        "gates": measure_gates(model, data),
        "seconds": time.perf_counter() - started,
    }


def make_optimizer(model: nn.Module, arm: str, rate: float) -> torch.optim.Optimizer:
    """Return SGD; ``arm`` says by its name how many times faster the gates move."""
    factor = int(arm.rpartition("-gates-x")[2]) if "-gates-x" in arm else 1
    groups: Iterable[Any] = model.parameters()
    if factor != 1:
        groups = ecanet.parameter_groups(model, rate, gate_lr=factor * rate)
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    settings: dict[str, Any],
    part: dict[str, Any],
    seed: int,
    after_step: Any = None,
) -> float:
    """Train for the steps of ``part`` on its images in an order that follows from ``seed``; return the last loss.

    The loss is the mean over the last 20 steps. ``after_step`` is called with the number of steps so far.
    """
    low, high = part["images"]
    steps, batch = part["steps"], settings["batch_size"]
    order = low + np.random.default_rng(seed).permutation(high - low)

    def factor(step: int) -> float:
        return min((step + 1) / 10, 1.0) * 0.5 * (1 + np.cos(np.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    torch.manual_seed(seed)  # of dropout
    model.to(memory_format=torch.channels_last).train()
    losses: list[float] = []
    for step in range(steps):
        chosen = torch.from_numpy(np.take(order, range(step * batch, (step + 1) * batch), mode="wrap"))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.prepare(data.images[chosen])), data.labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step + 1)
            model.train()
    return mean(losses[-20:])


@torch.no_grad()
def compute_logits(model: nn.Module, data: Data, images: Tensor) -> Tensor:
    """Return the logits (N, classes) for grey images in evaluation mode."""
    model.eval()
    return torch.cat([model(data.prepare(part)) for part in images.split(250)])


def compute_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is that of their label."""
    return (logits.argmax(1) == labels).double().mean().item()


def measure_gates(model: nn.Module, data: Data) -> list[dict[str, Any]]:
    """Return, for each gate, its largest parameter and how its weights for 250 held-out images differ from 1.

    ``mean_distance`` is the mean of ``|weight - 1|``, ``deviation`` the standard deviation between images.
    """
    sites = ecanet.attached(model)
    if not sites:
        return []
    model.eval()
    weights = compute_image_weights(model, data.prepare(data.held_out[0][:250]))
    found: list[dict[str, Any]] = []
    for site in sites:
        gate, seen = model.get_submodule(site.name), weights[site.name].double()
        found.append(
            {
                "name": site.name,
                "largest_parameter": max(float(p.detach().abs().max()) for p in gate.parameters()),
                "mean_distance": float((seen - 1).abs().mean()),
                "largest_distance": float((seen - 1).abs().max()),
                "deviation": float(seen.std(0, correction=0).mean()),
            }
        )
    return found
