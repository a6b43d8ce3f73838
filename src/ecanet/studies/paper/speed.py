"""Training and inference rates of a backbone's networks, each as a share of the plain network's rate."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ecanet.networks import find
from ecanet.recipes import ModelConfig
from ecanet.studies.paper.cells import Cell
from ecanet.studies.paper.rows import Table

__all__ = ["add_speed", "batch_size", "format_shares", "time_networks"]


def batch_size(device: str) -> int:
    """Return the number of images in a step whose speed is measured."""
    return 2 if device == "cpu" else 32


def add_speed(table: Table, cells: list[dict[str, Cell]], device: str) -> None:
    """Measure every network of ``table``, and write its share of the plain network's rate into ``cells``."""
    for plain in (i for i, row in enumerate(table.rows) if row.model and row.model.attention == "none"):
        networks = _networks_like(table, plain)
        times = time_networks(list(networks.values()), device, batch=batch_size(device))
        for column, seconds in zip(("Train FPS", "Infer FPS"), times, strict=True):
            for i, share in zip(networks, format_shares(seconds, list(networks).index(plain)), strict=True):
                printed, plain_printed = table.rows[i].printed[column], table.rows[plain].printed[column]
                expected = "" if printed == "N/A" else f"{float(printed) / float(plain_printed):.2f} of plain, "
                cells[i][column] = Cell(printed=printed, here=f"{expected}measured {share}")


def _networks_like(table: Table, plain: int) -> dict[int, ModelConfig]:
    """Return the networks with the backbone of row ``plain``, by row number."""
    models = {i: row.model for i, row in enumerate(table.rows) if row.model is not None}
    return {i: model for i, model in models.items() if model.name == models[plain].name}


def format_shares(seconds: list[list[float]], plain: int) -> list[str]:
    """Return each network's rate as a share of network ``plain``'s: median, lowest and highest round.

    ``seconds`` has a list for each network, with one time for each round. Only times of the same round are compared.

    >>> format_shares([[1.0, 1.0, 2.0], [2.0, 1.0, 2.5]], plain=0)
    ['1.00 (1.00 to 1.00)', '0.80 (0.50 to 1.00)']
    """
    ratios = [sorted(p / t for p, t in zip(seconds[plain], row, strict=True)) for row in seconds]
    return [f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios]


def time_networks(
    models: Sequence[ModelConfig], device: str, *, batch: int, side: int = 224, rounds: int = 5
) -> tuple[list[list[float]], list[list[float]]]:
    """Return the seconds of a training step and of an inference, for each network and each round.

    Every round runs every network once, so that a slow moment of the machine affects all of them. One more round, not
    reported, warms up.
    """
    networks = [
        find(m.name, attention=m.attention, kernel_sizes=m.kernel_sizes, **m.options).to(device) for m in models
    ]
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    train: list[list[float]] = [[] for _ in networks]
    infer: list[list[float]] = [[] for _ in networks]
    for round_number in range(rounds + 1):
        for i, network in enumerate(networks):
            network.train()
            train_seconds = _time_step(lambda network=network: network(images).square().mean().backward(), device)
            network.zero_grad(set_to_none=True)
            network.eval()
            with torch.inference_mode():
                infer_seconds = _time_step(lambda network=network: network(images), device)
            if round_number > 0:
                train[i].append(train_seconds)
                infer[i].append(infer_seconds)
    return train, infer


def _time_step(step: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))
    return time.perf_counter() - started
