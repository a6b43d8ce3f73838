"""Where images come from: small sets held in memory whole, and folders of files read as they are needed."""

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecanet.data.pictures import read_image
from ecanet.errors import DataError

__all__ = [
    "SMALL_SETS",
    "DataSpec",
    "Folder",
    "Memory",
    "SmallSet",
    "Unreadable",
    "cache_folder",
    "check_classes",
    "class_folders",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What a set of images looks like to a network: square, ``size`` pixels, normalised by ``mean`` and ``std``."""

    class_names: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # the evaluation crop's share of the short side
    crop: float = 1.0

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) as float32 of mean 0 and deviation 1."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`: uint8 again."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# sources held in memory


def check_classes(name: str, there: DataSpec, known: DataSpec) -> None:
    """Raise DataError unless the data called ``name``, described by ``there``, have the classes of ``known``."""
    pairs = zip_longest(there.class_names, known.class_names, fillvalue="nothing")
    differ = next((f"{mine} for {theirs}" for mine, theirs in pairs if mine != theirs), None)
    if differ is not None:
        raise DataError(
            f"{name} has {len(there.class_names)} classes and the network {len(known.class_names)}; the first that "
            f"differs is {differ}"
        )
    if there.channels != known.channels:
        raise DataError(f"{name} has images of {there.channels} channels, the network takes {known.channels}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallSet:
    """A set that fits in memory: ``load(root, train)`` gives uint8 images (N, C, H, W) and labels (N,)."""

    load: Callable[[str | None, bool], tuple[Tensor, Tensor]]
    spec: DataSpec


class Memory(Dataset[Any]):
    """Images (N, C, H, W) and labels (N,) in memory, handed out a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One indexing for the batch: a Python loop over images would cost more than a small network."""
        at = torch.as_tensor(indices)
        return self.images[at], self.labels[at]


def load_digits(root: str | None, train: bool) -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; every fifth is held out for evaluation."""
    from sklearn import datasets

    if root:
        raise DataError("--data-dir means nothing for digits, which scikit-learn brings along")

    bunch: Any = datasets.load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    held_out = torch.arange(len(labels)) % 5 == 0
    mine = ~held_out if train else held_out
    return images[mine], labels[mine]


def load_fashion_mnist(root: str | None, train: bool) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: 60,000 and 10,000 pieces of clothing, grey, 28 × 28, from wherever the four files lie."""
    part = "train" if train else "t10k"
    places = (
        [Path(root), Path(root, "FashionMNIST", "raw")]
        if root
        else [FASHION_FOLDER, cache_folder("FashionMNIST", "raw")]
    )
    for place in (p for p in places if _idx(p, f"{part}-images-idx3-ubyte")):
        images = read_idx(_found(place, f"{part}-images-idx3-ubyte"))[:, None]
        labels = read_idx(_found(place, f"{part}-labels-idx1-ubyte")).long()
        if len(images) != len(labels):
            raise DataError(f"{place}: {len(images)} {part} images but {len(labels)} labels; get the files anew")
        return images, labels
    remedy = (
        "get it with Debian's package (`apt install dataset-fashion-mnist`), or online with torchvision "
        "(`torchvision.datasets.FashionMNIST('DIR', download=True)`, then --data-dir DIR)"
    )
    _download("FashionMNIST", root, train, remedy)
    return load_fashion_mnist(root or str(cache_folder()), train)


def load_cifar(classes: int) -> Callable[[str | None, bool], tuple[Tensor, Tensor]]:
    """A loader of CIFAR-10 or CIFAR-100: 50,000 and 10,000 colour photographs of 32 × 32."""

    def load(root: str | None, train: bool) -> tuple[Tensor, Tensor]:
        name = f"CIFAR{classes}"
        call = f"torchvision.datasets.{name}('DIR', download=True)"
        remedy = f"fetch it on a connected machine (`{call}`), then --data-dir DIR"
        data = _download(name, root, train, remedy)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)

    return load


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an idx file, gzipped or not.

    Raises:
        DataError: the file is not a whole idx file of bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no idx file of bytes")
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file anew") from None


def _idx(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _found(folder: Path, name: str) -> Path:
    if (path := _idx(folder, name)) is None:
        raise DataError(f"{folder}: {name} is missing, though its neighbours are there; get the four files anew")
    return path


def cache_folder(*parts: str) -> Path:
    """Where what is fetched or made stays between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ecanet", *parts)


def _download(name: str, root: str | None, train: bool, remedy: str) -> Any:
    """torchvision's data set ``name``, fetched once even where several processes start together."""
    import torchvision
    from filelock import FileLock

    if root and not Path(root).is_dir():
        raise DataError(f"{root}: no such folder")
    folder = Path(root) if root else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            return getattr(torchvision.datasets, name)(folder, train=train, download=True)
    except (OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name} is not in {folder} and cannot be downloaded ({why}); {remedy}") from None


def _look(names: str, channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
    return DataSpec(class_names=tuple(names.split(",")), channels=channels, size=size, mean=mean, std=std)


FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
CIFAR10 = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
CIFAR100 = (
    "apple,aquarium_fish,baby,bear,beaver,bed,bee,beetle,bicycle,bottle,bowl,boy,bridge,bus,butterfly,camel,can,castle,"
    "caterpillar,cattle,chair,chimpanzee,clock,cloud,cockroach,couch,crab,crocodile,cup,dinosaur,dolphin,elephant,"
    "flatfish,forest,fox,girl,hamster,house,kangaroo,keyboard,lamp,lawn_mower,leopard,lion,lizard,lobster,man,"
    "maple_tree,motorcycle,mountain,mouse,mushroom,oak_tree,orange,orchid,otter,palm_tree,pear,pickup_truck,pine_tree,"
    "plain,plate,poppy,porcupine,possum,rabbit,raccoon,ray,road,rocket,rose,sea,seal,shark,shrew,skunk,skyscraper,"
    "snail,snake,spider,squirrel,streetcar,sunflower,sweet_pepper,table,tank,telephone,television,tiger,tractor,train,"
    "trout,tulip,turtle,wardrobe,whale,willow_tree,wolf,woman,worm"
)
SMALL_SETS: dict[str, SmallSet] = {
    "digits": SmallSet(load=load_digits, spec=_look("0,1,2,3,4,5,6,7,8,9", 1, 8, (0.3053,), (0.3760,))),
    "fashion-mnist": SmallSet(load=load_fashion_mnist, spec=_look(FASHION, 1, 28, (0.2860,), (0.3530,))),
    "cifar10": SmallSet(
        load=load_cifar(10), spec=_look(CIFAR10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    ),
    "cifar100": SmallSet(
        load=load_cifar(100), spec=_look(CIFAR100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    ),
}


# sources read from files


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that could not be read; it travels in its image's place, since worker processes garble exceptions."""

    message: str


class Folder(Dataset[Any]):
    """Images under ``folder/CLASS/…`` as uint8 (C, H, W), after ``change``, with their class's number."""

    def __init__(self, folder: Path, class_names: Sequence[str], channels: int, change: Callable[[Tensor], Tensor]):
        self.channels, self.change = channels, change
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(class_names):
            found = sorted(str(p) for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(
                    f"{folder / name}: no images in this class folder; fill or remove it ({', '.join(IMAGE_SUFFIXES)})"
                )
            self.samples += [(path, label) for path in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        path, label = self.samples[index]
        try:
            return self.change(read_image(path, self.channels)), label
        except DataError as error:
            return Unreadable(str(error))


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in ``folder``, sorted.

    Raises:
        DataError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; folder:PATH needs PATH/train/CLASS/… and PATH/val/CLASS/…")
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise DataError(f"{folder}: no class folders in it; put each class's images in a folder of its name")
    return names
