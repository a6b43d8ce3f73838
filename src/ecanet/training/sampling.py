"""Take a few images of a data set as a network sees them: to calibrate an int8 file, and to try it."""

import torch
from torch import Tensor

from ecanet.data import ClassificationData, Draw, FolderDataset, MemoryDataset, build_eval_transform, read_image
from ecanet.errors import DataError

__all__ = ["sample_images"]


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
        pictures = [see(read_image(samples[at][0], spec.channels)) for at in chosen]
        return spec.normalize(torch.stack(pictures)), torch.tensor([samples[at][1] for at in chosen])
    if train:
        raise DataError(f"{images.config.name}: shards give augmented images alone; take folder:PATH")
    read = [source[Draw(at, 0)] for at in chosen]
    found = [one for one in read if isinstance(one, tuple)]
    return spec.normalize(torch.stack([one[0] for one in found])), torch.tensor([int(one[1]) for one in found])
