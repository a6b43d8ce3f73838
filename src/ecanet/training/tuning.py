"""Train a network a little further after it was changed, outside of a run."""

from itertools import cycle, islice

import torch

from ecanet.data import ClassificationData
from ecanet.errors import ConfigError
from ecanet.training.preparation import build_data
from ecanet.training.tasks import Classification

__all__ = ["fine_tune"]

RATE = 1e-3
"""Learning rate of the first step; it falls to zero in a straight line."""


def fine_tune(task: Classification, epochs: float, *, device: torch.device) -> int:
    """Train the network of ``task`` in place on its run's training images; return the number of steps.

    SGD with momentum 0.9, on images as they are evaluated, without augmentation of a batch. The network is left in
    evaluation mode.

    Args:
        task: a restored task, whose network may have been changed.
        epochs: length, in passes over the training images; 0.2 is a fifth of one.
        device: where to train.

    Raises:
        ConfigError: ``epochs`` is not positive.
        DataError: the training images are missing or broken.
    """
    if not epochs > 0:
        raise ConfigError(f"fine-tuning takes a positive number of epochs, such as 0.2, got {epochs:g}")
    images = build_data(task.recipe, split=task.split)
    assert isinstance(images, ClassificationData)
    loader = images.train_dataloader()
    steps = max(1, round(epochs * len(loader)))
    task.to(device).train()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=RATE, momentum=0.9)
    for step, batch in enumerate(islice(cycle(loader), steps)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        x, labels = images.on_after_batch_transfer(images.on_before_batch_transfer(batch, 0), 0)
        loss = task.loss(task(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    task.eval()
    return steps
