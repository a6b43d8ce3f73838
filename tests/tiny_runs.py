"""Runs of a second: 68 images of three grey levels, a recipe for them, and what a run has written."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecanet import training
from ecanet.data.sources import SMALL_SETS, DataSpec, SmallSet
from ecanet.recipes import DataConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig
from ecanet.report import Report

TINY = Recipe(
    name="tiny",
    data=DataConfig(name="tiny", batch_size=16, crop_padding=1),
    model=ModelConfig(name="resnet8"),
    optimizer=OptimizerConfig(learning_rate=0.02, base_batch=16),
    schedule=ScheduleConfig(warmup_epochs=0.5),
    epochs=4,
)


def load_tiny(root: str | None, training: bool, images: int = 48) -> tuple[Tensor, Tensor]:
    """Return 48 training or 20 held-out images of three classes: noise of three brightness levels."""
    count = images if training else 20
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    return (noise + 80 * labels[:, None, None, None]).to(torch.uint8), labels


def add_tiny(patch: pytest.MonkeyPatch, images: int = 48) -> None:
    """Make the images known under the name "tiny"."""
    spec = DataSpec(class_names=("dark", "grey", "light"), channels=1, size=8, mean=(0.4,), std=(0.3,))
    patch.setitem(SMALL_SETS, "tiny", SmallSet(load=partial(load_tiny, images=images), spec=spec))


def run(recipe: Recipe, folder: Path, **options: Any) -> Report:
    return training.run(recipe, folder=folder, device="cpu", quiet=True, **options)


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def weights(report: Report) -> dict[str, Tensor]:
    return content(report.last_checkpoint)["state_dict"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def check_close(a: Path, b: Path) -> None:
    """Check that losses and weights differ by rounding alone, which the network's depth and nine steps magnify."""
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert read_column(a, name) == pytest.approx(read_column(b, name), rel=1e-4)
    other = read_weights(b)
    for name, value in read_weights(a).items():
        assert torch.allclose(value.float(), other[name].float(), rtol=1e-3, atol=1e-5), name


def check_states(a: Path, b: Path) -> None:
    """Check that two checkpoints have the same optimizer state, up to rounding."""
    (found,), (expected,) = (content(path)["optimizer_states"] for path in (a, b))
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        for name, value in values.items():
            other = found["state"][index][name]
            assert (type(other), other.shape) == (torch.Tensor, value.shape)
            assert torch.allclose(other, value, rtol=1e-3, atol=1e-4), (index, name)
