"""Class weights in both losses, and the accuracy that counts every class the same."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ecanet.errors import ConfigError
from ecanet.recipes import DataConfig, ModelConfig, Recipe, from_dict, to_dict, with_settings
from ecanet.training import trainer
from ecanet.training.tasks import Classification
from ecanet.training.tasks.losses import balance_classes, compute_loss
from photographs import make_flat

KINDS = ["cross-entropy", "bce"]


def one_label_loss(x: list[float], label: int, kind: str, smoothing: float) -> float:
    """Return the loss of one image with one label, by loops."""
    classes = len(x)
    total = 0.0
    for k in range(classes):
        target = (1 - smoothing) * (k == label) + smoothing / classes
        if kind == "bce":
            p = 1 / (1 + math.exp(-x[k]))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
        else:
            total -= target * (x[k] - math.log(sum(math.exp(v) for v in x)))
    return total


def loop(logits: Tensor, labels: Tensor, weights: list[float], kind: str, smoothing: float) -> float:
    shares = F.one_hot(labels, len(weights)) if labels.ndim == 1 else labels
    total = 0.0
    for x, q in zip(logits.tolist(), shares.tolist(), strict=True):
        total += sum(q[y] * weights[y] * one_label_loss(x, y, kind, smoothing) for y in range(len(weights)))
    return total / len(logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.2, 3.0, 0.0, 0.8], [0.0, 0.0, 0.0, 5.0]])
def test_weighted_losses_equal_their_definition(kind, smoothing, weights):
    random = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(7, 4, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 4, (7,), generator=random)
    mixed = torch.rand(7, 4, generator=random, dtype=torch.float64).softmax(1)
    mixup = 0.3 * F.one_hot(labels, 4).double() + 0.7 * F.one_hot(labels.flip(0), 4).double()
    for given in (labels, mixed, mixup):
        times = torch.tensor(weights, dtype=torch.float64)
        found = compute_loss(logits, given, name=kind, smoothing=smoothing, weights=times)
        assert found.item() == pytest.approx(loop(logits, given, weights, kind, smoothing), rel=1e-12)
        if set(weights) == {1.0}:
            plain = compute_loss(logits, given, name=kind, smoothing=smoothing)
            assert found.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_as_good_as_a_repeated_image(kind):
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 2, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    weighted = compute_loss(logits, labels, name=kind, smoothing=0.1, weights=weights) * 3
    again = torch.tensor([0, 1, 1, 1, 2])
    repeated = compute_loss(logits[again], labels[again], name=kind, smoothing=0.1) * 5
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(loss, logits) for loss in (weighted, repeated)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("counts", [[3, 3], [10, 2, 5], [1, 1, 98]])
def test_balanced_weights_give_every_class_the_same_sum(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    weights = balance_classes(labels, len(counts))
    sums = [float(weights[label]) * count for label, count in enumerate(counts)]
    assert sums == pytest.approx([len(labels) / len(counts)] * len(counts))
    # The mean over the images is 1, so that the learning rate keeps its meaning.
    assert float(weights[labels].mean()) == pytest.approx(1)


# a run


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    data = DataConfig(name=f"folder:{folder}", image_size=16, batch_size=8, workers=0)
    return Recipe(data=data, model=ModelConfig(name="resnet8"), epochs=1).but(**changes)


def weights_in_use(recipe: Recipe, folder: Path) -> list[Tensor | None]:
    """Train, and return the weights of each step."""
    seen: list[Tensor | None] = []
    step = Classification.training_step

    def note(self: Classification, *batch: Any) -> Tensor | None:
        seen.append(self.class_weights)
        return step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "training_step", note)
        trainer.run(recipe, folder=folder, device="cpu", quiet=True)
    return seen


def test_a_run_uses_its_weights(tmp_path):
    photos = make_flat(tmp_path / "photos", {"a": 20, "b": 5})
    [balanced, *_] = weights_in_use(recipe_for(photos, class_weights="balanced"), tmp_path / "balanced")
    # 16 and 4 of them are trained on.
    assert balanced is not None
    assert balanced.tolist() == [0.625, 2.5]
    [given, *_] = weights_in_use(recipe_for(photos, class_weights=(1, 2.5), ema_decay=0.5), tmp_path / "given")
    assert given is not None
    assert given.tolist() == [1, 2.5]
    assert not any(weights_in_use(recipe_for(photos, mixup=0.2), tmp_path / "plain"))


def test_settings_of_class_weights(tmp_path):
    assert with_settings(Recipe(), {"class_weights": [1, 2.5]}).class_weights == (1.0, 2.5)
    recipe = Recipe(class_weights="balanced")
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    for wrong in ((), (0, 0), (1, -1)):
        with pytest.raises(ConfigError, match="class_weights must be 'balanced' or a number of at least 0 for each"):
            Recipe(class_weights=wrong)
    for wrong in ("even", (1, "2"), (1, float("nan")), 3):
        with pytest.raises(ConfigError, match="class_weights must be 'balanced' or a list of finite numbers or None"):
            Recipe(class_weights=wrong)  # type: ignore
    with pytest.raises(ConfigError, match="would balance twice; leave one out"):
        Recipe(class_weights="balanced", data=DataConfig(sampler="balanced"))
    photos = make_flat(tmp_path / "photos", {"a": 4, "b": 4})
    with pytest.raises(ConfigError, match="class_weights has 3 numbers and folder:.* 2 classes; give one number for"):
        trainer.run(recipe_for(photos, class_weights=(1, 1, 2)), folder=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="class_weights is for classification"):
        trainer.run(Recipe(task="detection", class_weights="balanced"), folder=tmp_path / "run", quiet=True)


def test_macro_is_there_where_classes_are_uneven_and_top5_with_six_classes(tmp_path):
    even = make_flat(tmp_path / "even", dict.fromkeys("abcde", 5))
    report = trainer.run(recipe_for(even), folder=tmp_path / "1", device="cpu", quiet=True)
    assert {"top1", "val_loss"} <= set(report.metrics)
    assert not {"macro", "top5"} & set(report.metrics)
    uneven = make_flat(tmp_path / "uneven", {name: 5 + 20 * (name == "a") for name in "abcdef"})
    report = trainer.run(recipe_for(uneven), folder=tmp_path / "2", device="cpu", quiet=True)
    matrix = report.artifacts["confusion"]
    assert matrix is not None
    assert report.metrics["macro"] == pytest.approx(100 * sum(row[k] / sum(row) for k, row in enumerate(matrix)) / 6)
    assert "top5" in report.metrics
    assert "mean of the classes" in (tmp_path / "2" / "report.html").read_text()
