"""Images in one folder per class, read from disk when they are needed: which are trained on, and which are held out.

A folder has ImageNet's layout (PATH/train/CLASS/… and PATH/val/CLASS/…) or is flat (PATH/CLASS/…). The images of a flat
folder are split once for a run. The run keeps the split, so no image ever moves from the held-out part to the
training part: files that are added later are counted and not used, and files that are gone are named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ecanet.data.listing import (
    Listing,
    describe_ignored,
    find_similar_names,
    list_folder,
    list_names,
    make_readable,
)
from ecanet.data.pictures import IMAGE_SUFFIXES, Unreadable, read_image
from ecanet.data.randomness import Draw, use_sample_stream
from ecanet.data.split import Split, compare_split, drop_second_names, leave_out_trained, make_split
from ecanet.errors import DataError
from ecanet.recipes import DataConfig

__all__ = ["FolderDataset", "FolderImages", "Transform", "find_images"]

Transform = Callable[[Tensor], Tensor]
"""A function from images to images, both as tensors."""

LAYOUTS = "PATH/train/CLASS/… and PATH/val/CLASS/…, or PATH/CLASS/… alone"

TRAIN, HELD_OUT, TEST = ("train", "training"), ("val", "valid", "validation"), ("test",)
"""The names of a folder's parts, in any case; ``test`` is the held-out part where there is no other."""

DEFAULT_SHARE = 0.2
"""Share of a flat folder's images that is held out."""


class FolderDataset(Dataset[tuple[Tensor, int, Draw] | Unreadable]):
    """Images as uint8 tensors (C, H, W), after ``transform``, with the class's index and the sampler's draw.

    ``paths`` lists the images by class, below ``folder``. The random numbers of ``transform`` depend on the ``seed``
    and the draw alone.
    """

    def __init__(
        self, folder: Path, paths: Mapping[int, Sequence[str]], channels: int, transform: Transform, *, seed: int = 0
    ):
        self.channels, self.transform, self.seed = channels, transform, seed
        self.samples = [(str(folder / path), label) for label in sorted(paths) for path in paths[label]]

    def __len__(self) -> int:
        return len(self.samples)

    def get_labels(self) -> list[int]:
        """Return the label of each image."""
        return [label for _, label in self.samples]

    def name_image(self, index: int) -> str:
        """Return the path of an image."""
        return self.samples[index][0]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, Draw] | Unreadable:
        path, label = self.samples[draw.image]
        try:
            image = read_image(path, self.channels)
        except DataError as error:
            return Unreadable(str(error))
        with use_sample_stream(self.seed, draw.epoch, draw.image, draw.repeat):
            return self.transform(image), label, draw


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderImages:
    """The images of a folder: a folder and the paths below it by label, for each part; ``train`` may be None.

    ``split`` is a flat folder's. ``notices`` are lines for the user.
    """

    class_names: tuple[str, ...]
    train: tuple[Path, dict[int, list[str]]] | None
    held_out: tuple[Path, dict[int, list[str]]]
    split: Split | None
    notices: list[str]


def find_images(config: DataConfig, *, seed: int, train: bool, split: Split | None) -> FolderImages:
    """Return the images of ``folder:PATH``; with ``train=False`` only the held-out ones.

    Of a flat folder these are the images that ``split`` holds out, or all images without a ``split``.

    Raises:
        DataError: folders or images are missing, or a setting does not fit the folder.
    """
    folder = Path(config.name.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; folder:PATH needs {LAYOUTS}")
    parts = _find_parts(folder)
    if parts is None:
        return _read_flat(folder, config, seed=seed, train=train, split=split)
    if split is not None and split.held_out:
        raise DataError(
            f"{folder} now has {parts[0].name}/ and {parts[1].name}/, but the run has split {folder} itself; give it "
            "the old layout again"
        )
    if config.val_share is not None:
        raise DataError(
            f"data.val_share ({config.val_share:g}) is for a folder without held-out images; {folder} has "
            f"{parts[1].name}/: leave --val-share out"
        )
    return _read_parts(folder, *parts, train=train)


def _find_parts(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of the training and of the held-out images, or None if ``folder`` has neither.

    Raises:
        DataError: it is not clear which is which, or a part holds images and no class folders.
    """
    names = list_names(folder)
    training = [name for name in names if name.lower() in TRAIN]
    held_out = [name for name in names if name.lower() in HELD_OUT] or [name for name in names if name.lower() in TEST]
    for group in (training, held_out):
        if len(group) > 1:
            raise DataError(f"{folder}: {group[0]}/ and {group[1]}/ could both be meant; rename or move one")
    for name in (*training, *held_out):
        part = folder / name
        if not list_names(part) and any(path.suffix.lower() in IMAGE_SUFFIXES for path in part.iterdir()):
            raise DataError(
                f"{part}: images, but no class folders; if {name!r} is a class, rename this folder (for example to "
                f"{name}_), else make {part}/CLASS/…"
            )
    if not training and not held_out:
        return None
    return folder / (training or TRAIN)[0], folder / (held_out or HELD_OUT)[0]


# ImageNet's layout


def _read_parts(folder: Path, training: Path, held_out: Path, *, train: bool) -> FolderImages:
    parts = (training, held_out) if train else (held_out,)
    for part in parts:
        if not part.is_dir():
            raise DataError(f"{part}: no such folder; folder:PATH needs {LAYOUTS}")
    listings = {part: list_folder(part) for part in parts}
    names = tuple(listings[training if train else held_out].images)
    _check_count(folder, names)
    if unknown := sorted(set(listings[held_out].images) - set(names)):
        raise DataError(f"{held_out / unknown[0]}: {training.name}/ has no such class; add it there or remove it here")
    by_label = {part: _number(part, names, listing) for part, listing in listings.items()}
    ignored: dict[str, list[str]] = {}
    for part, listing in listings.items():
        for kind, paths in listing.ignored.items():
            ignored[kind] = ignored.get(kind, []) + [f"{part.name}/{path}" for path in paths]
    known = (*TRAIN, *HELD_OUT, *TEST)
    ignored["beside"] = [f"{name}/" for name in list_names(folder) if name.lower() not in known]
    return FolderImages(
        class_names=tuple(make_readable(name) for name in names),
        train=(training, by_label[training]) if train else None,
        held_out=(held_out, by_label[held_out]),
        split=None,
        notices=_notices(folder, names, ignored),
    )


def _number(part: Path, names: Sequence[str], listing: Listing) -> dict[int, list[str]]:
    """Return the images of ``part`` by the index of their class.

    Raises:
        DataError: a class has no images there.
    """
    for name in names:
        if not listing.images.get(name):
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{part / name}: no images in this class folder; fill or remove it ({suffixes})")
    return {label: listing.images[name] for label, name in enumerate(names)}


# a flat folder


def _read_flat(folder: Path, config: DataConfig, *, seed: int, train: bool, split: Split | None) -> FolderImages:
    listing = list_folder(folder)
    found = {name: paths for name, paths in listing.images.items() if paths}
    notices: list[str] = []
    if split is not None and split.held_out:
        names = split.class_names
        notices += compare_split(split, found, folder, train=train, skip=config.on_corrupt == "skip")
        held_out = list(split.held_out)
    else:
        names = tuple(found)
        _check_count(folder, names)
        if train:
            found = drop_second_names(found, folder, listing.ignored["again"])
            share = DEFAULT_SHARE if config.val_share is None else config.val_share
            seen = frozenset(split.train if split is not None else ())
            if again := sum(path in seen for paths in found.values() for path in paths):
                notices.append(f"none of the {again:,} images that the weights were trained on is held out")
            split = make_split(found, share, seed=seed, folder=folder, seen=seen)
            held_out = list(split.held_out)
        else:
            held_out = [path for paths in found.values() for path in paths]
            held_out, lines = leave_out_trained(held_out, split, folder)
            notices += lines
    return FolderImages(
        class_names=tuple(make_readable(name) for name in names),
        train=(folder, _group(split.train, names)) if train and split is not None else None,
        held_out=(folder, _group(held_out, names)),
        split=split,
        notices=notices + _notices(folder, names, listing.ignored),
    )


def _group(paths: Sequence[str], names: Sequence[str]) -> dict[int, list[str]]:
    """Return ``paths`` by the index of their class, which is their first folder."""
    labels = {name: label for label, name in enumerate(names)}
    groups: dict[int, list[str]] = {label: [] for label in labels.values()}
    for path in paths:
        groups[labels[path.partition("/")[0]]].append(path)
    return groups


def _check_count(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError if there are fewer than two classes."""
    if not names:
        raise DataError(f"{folder}: no images in its class folders ({', '.join(IMAGE_SUFFIXES)})")
    if len(names) == 1:
        inner = folder / names[0]
        hint = f"; did you mean folder:{inner}?" if inner.is_dir() and len(list_names(inner)) > 1 else ""
        raise DataError(f"{folder}: only one class ({names[0]}); classification needs two class folders or more{hint}")


def _notices(folder: Path, names: Sequence[str], ignored: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line about ignored entries, and one about each pair of classes with almost the same name."""
    lines = [
        f"two classes: {first!r} and {second!r} in {folder} differ only by case or accents"
        for first, second in find_similar_names(names)
    ]
    line = describe_ignored(ignored, folder)
    return [*([line] if line else []), *lines]
