"""Count what MobileNetV2 still knows right after attention was put in, and after batch norm was measured again.

Nothing is trained here. 20 labelled pictures are classified; 160 crops of other photographs, without labels, are what
batch-norm statistics are measured on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from packages import Files
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.transforms import RandomResizedCrop, functional

import ecanet

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "eca": {"attention": "eca"},
    "se": {"attention": "se"},
    "cbam": {"attention": "cbam"},
    "eca-random": {"attention": "eca", "preserve": False},
    "se-random": {"attention": "se", "preserve": False},
}
CROPS = 10
"""Crops of each photograph."""


def make_network(weights: Path) -> nn.Module:
    """Return torchvision's MobileNetV2 with the ImageNet weights of the file, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing in the file or does not fit.
    """
    model = torchvision.models.mobilenet_v2()
    report = ecanet.load_checkpoint(model, weights)
    if report.missing or report.mismatched or report.unexpected:
        raise ecanet.errors.CheckpointError(f"{weights} does not fit torchvision's mobilenet_v2; {report}")
    return model.eval()


def run(files: Files, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm, seed (of the random gates) and state of the batch-norm statistics."""
    see = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    images = torch.stack([see(read(path)) for path in files.pictures])
    labels = torch.tensor([int(path.stem.split("_")[-1]) for path in files.pictures])
    crops = cut_crops(files.photographs)
    plain = compute_logits(make_network(files.weights), images)
    for arm, options in ARMS.items():
        for seed in range(seeds if arm.endswith("-random") else 1):
            model = make_network(files.weights)
            torch.manual_seed(seed)
            if options is not None:
                ecanet.attach(model, **options)
            row = {"arm": arm, "seed": seed}
            logits = compute_logits(model, images)
            equal = torch.equal(logits, plain)
            yield {**row, "recalibrated": False, "bit_equal": equal, **count_correct(logits, labels)}
            if len(crops):
                update_bn(crops.split(40), model)
                yield {**row, "recalibrated": True, **count_correct(compute_logits(model, images), labels)}


def cut_crops(photographs: list[Path]) -> Tensor:
    """Return normalised crops (N, 3, 224, 224), ten of each photograph, of 15 to 100 % of its area."""
    see = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    torch.manual_seed(0)
    cut = RandomResizedCrop(224, scale=(0.15, 1.0))
    crops: list[Tensor] = []
    for path in photographs:
        image = read(path)
        image.thumbnail((1024, 1024))
        crops += [functional.normalize(functional.to_tensor(cut(image)), see.mean, see.std) for _ in range(CROPS)]
    return torch.stack(crops) if crops else torch.empty(0, 3, 224, 224)


def read(path: Path) -> Image.Image:
    """Return the picture in the file ``path`` in colour."""
    with Image.open(path) as image:
        return image.convert("RGB")


@torch.no_grad()
def compute_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, classes) for ``images`` in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(40)])


def count_correct(logits: Tensor, labels: Tensor) -> dict[str, int]:
    """Return how many of the images have their label first, and among the first five."""
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    return {"top1": int((logits.argmax(1) == labels).sum()), "top5": int(top5.sum()), "of": len(labels)}
