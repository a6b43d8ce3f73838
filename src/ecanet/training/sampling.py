"""Say what images a network takes, and take a few of a data set: to calibrate an int8 file, and to try it."""

import torch
from torch import Tensor

from ecanet import progress
from ecanet.data import ClassificationData, Draw, FolderDataset, MemoryDataset, build_eval_transform, read_image
from ecanet.errors import DataError
from ecanet.networks import Preprocessing
from ecanet.training.tasks import Classification, Task

__all__ = ["describe_images", "sample_images"]


def describe_images(task: Task) -> Preprocessing:
    """Return how an image becomes the input of ``task.model``, for those who have the network without the task.

    A task repeats grey images for a network that takes three channels. Without it, each of them has the mean and the
    standard deviation of grey.
    """
    spec = task.spec
    channels = task.channels if isinstance(task, Classification) else spec.channels
    times = channels // spec.channels
    return Preprocessing(
        channels=channels,
        size=spec.size,
        mean=spec.mean * times,
        std=spec.std * times,
        crop=spec.crop,
        interpolation=spec.interpolation,
    )


def sample_images(images: ClassificationData, count: int, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return ``count`` images (N, C, H, W), normalized and not augmented, and their labels (N,).

    They are spread evenly over the training or held-out images, so that every class is among them.

    Raises:
        DataError: an image cannot be read, or the data give no training images without augmentation.
    """
    source = images.train if train else images.held_out
    assert source is not None
    step = max(1, len(source) / count)
    chosen = [int(at * step) for at in range(min(count, len(source)))]
    spec = images.spec
    if isinstance(source, MemoryDataset):
        return spec.normalize(source.images[chosen]), source.labels[chosen]
    if isinstance(source, FolderDataset):
        samples = source.samples
        see = build_eval_transform(spec)
        pictures = [see(read_image(samples[at][0], spec.channels)) for at in progress.track(chosen, "reading images")]
        return spec.normalize(torch.stack(pictures)), torch.tensor([samples[at][1] for at in chosen])
    if train:
        raise DataError(f"{images.config.name}: shards give augmented images alone; take folder:PATH")
    read = [source[Draw(at, 0)] for at in chosen]
    found = [one for one in read if isinstance(one, tuple)]
    return spec.normalize(torch.stack([one[0] for one in found])), torch.tensor([int(one[1]) for one in found])
