"""Images in one folder per class, read from disk when they are needed (ImageNet's layout)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ecanet.data.pictures import IMAGE_SUFFIXES, Unreadable, read_image
from ecanet.errors import DataError

__all__ = ["FolderDataset", "Transform", "list_classes"]

Transform = Callable[[Tensor], Tensor]
"""A function from images to images, both as tensors."""


class FolderDataset(Dataset[tuple[Tensor, int] | Unreadable]):
    """Images under ``folder/CLASS/…`` as uint8 tensors (C, H, W), after ``transform``, with the class's index.

    Raises:
        DataError: a class folder holds no image files.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], channels: int, transform: Transform):
        self.channels, self.transform = channels, transform
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(class_names):
            paths = sorted(str(p) for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not paths:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise DataError(f"{folder / name}: no images in this class folder; fill or remove it ({suffixes})")
            self.samples += [(path, label) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        path, label = self.samples[index]
        try:
            return self.transform(read_image(path, self.channels)), label
        except DataError as error:
            return Unreadable(str(error))


def list_classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in ``folder``, sorted; hidden folders are left out.

    Raises:
        DataError: ``folder`` does not exist, or holds no class folders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; folder:PATH needs PATH/train/CLASS/… and PATH/val/CLASS/…")
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise DataError(f"{folder}: no class folders; put the images of each class into a folder named after the class")
    return names
