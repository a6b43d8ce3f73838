"""What a data set looks like (`DataSpec`), and the small data sets that are held in memory."""

import functools
import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, cast
from unicodedata import category

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ecanet.data import garments, glyphs
from ecanet.data.randomness import Draw
from ecanet.errors import DataError, show_value, summarize
from ecanet.models import get_cache_folder

__all__ = ["SMALL_SETS", "DataSpec", "MemoryDataset", "SmallSet", "check_classes"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs the four files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """The images of a data set as a network sees them: square, ``size`` pixels, normalized by ``mean`` and ``std``.

    ``mean`` and ``std`` have one value per channel, for pixel values from 0 to 1. ``crop`` is the side of the central
    crop in evaluation, as a share of the image's short side. ``interpolation`` resizes images: "bilinear", "bicubic" or
    "nearest".
    """

    class_names: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bilinear"

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "DataSpec":
        """Return the description whose fields are ``values``; a file may have lists for the tuples.

        Raises:
            DataError: a field is missing or unknown, or its value cannot be true of images.
        """
        fields = {
            key: tuple(cast(list[object], value)) if isinstance(value, list) else value for key, value in values.items()
        }
        if unknown := [key for key in fields if key not in SPEC_CHECKS]:
            raise DataError(f"the data's description has the unknown field {show_value(unknown[0])}")
        for name, fits in SPEC_CHECKS.items():
            if name not in fields and name not in ("crop", "interpolation"):
                raise DataError(f"the data's description has no {name!r}")
            if name in fields and not fits(fields[name]):
                raise DataError(f"the data's description has {name}={show_value(fields[name])}, which no images have")
        spec = cls(**cast(dict[str, Any], fields))
        if not len(spec.mean) == len(spec.std) == spec.channels:
            raise DataError(f"the data's description has {spec.channels} channels, but {len(spec.mean)} means")
        return spec

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, C, H, W) as float32 with mean 0 and standard deviation 1."""
        mean, std = (_make_constant(values, images.device) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Return normalized images (N, C, H, W) as uint8: the inverse of `normalize`."""
        mean, std = (_make_constant(values, images.device) for values in (self.mean, self.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _is_number(value: object, lowest: float, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1024 and not any(category(c) in ("Cc", "Cs") for c in value)


def _are(fits: Callable[..., bool], *limits: float) -> Callable[[object], bool]:
    """Return a function that says whether a value is a tuple of 1 to 131,072 items that all fit."""

    def check(value: object) -> bool:
        items = cast(tuple[object, ...], value) if isinstance(value, tuple) else ()
        return 0 < len(items) <= 2**17 and all(fits(item, *limits) for item in items)

    return check


SPEC_CHECKS: dict[str, Callable[[object], bool]] = {
    "class_names": _are(_is_name),
    "channels": lambda value: isinstance(value, int) and _is_number(value, 1, 64),
    "size": lambda value: isinstance(value, int) and _is_number(value, 1, 4096),
    "mean": _are(_is_number, -1e3, 1e3),
    "std": _are(_is_number, 1e-6, 1e3),
    "crop": lambda value: _is_number(value, 0.1, 1),
    "interpolation": lambda value: value in ("bilinear", "bicubic", "nearest"),
}
"""Which values each field of a `DataSpec` can have: one may come from anybody's checkpoint."""


@functools.cache
def _make_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one value per channel as a tensor (C, 1, 1), made once: a GPU would wait for each new one."""
    with torch.inference_mode(False):  # it may be needed again where gradients are computed
        return torch.tensor(values, device=device)[:, None, None]


def check_classes(name: str, found: DataSpec, expected: DataSpec) -> None:
    """Check that the data set ``name``, described by ``found``, fits a network made for ``expected``.

    Raises:
        DataError: the class names or the number of channels differ.
    """
    pairs = zip_longest(found.class_names, expected.class_names, fillvalue="nothing")
    difference = next((f"{mine} for {theirs}" for mine, theirs in pairs if mine != theirs), None)
    if difference is not None:
        raise DataError(
            f"{name} has {len(found.class_names)} classes and the network {len(expected.class_names)}; the first that "
            f"differs is {difference}"
        )
    if found.channels != expected.channels:
        raise DataError(f"{name} has images of {found.channels} channels, the network takes {expected.channels}")


# data sets in memory

Arrays = tuple[Tensor, Tensor]
"""uint8 images (N, C, H, W) and int64 labels (N,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallSet:
    """A data set that fits in memory: ``load(root, train)`` returns its images and labels."""

    load: Callable[[str | None, bool], Arrays]
    spec: DataSpec


class MemoryDataset(Dataset[tuple[Tensor, Tensor, list[Draw]]]):
    """Images (N, C, H, W) and labels (N,) in memory, from which a loader takes a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        """Return the label of each image."""
        return cast(list[int], self.labels.tolist())  # pyright: ignore[reportUnknownMemberType]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, list[Draw]]:
        return self.__getitems__([draw])

    def __getitems__(self, draws: list[Draw]) -> tuple[Tensor, Tensor, list[Draw]]:
        """Return a batch by one indexing operation: a Python loop over images would cost more than a small network."""
        batch = torch.as_tensor([draw.image for draw in draws])
        return self.images[batch], self.labels[batch], draws


class _Digits(Protocol):
    images: NDArray[np.float64]
    target: NDArray[np.int64]


def load_digits(root: str | None, train: bool) -> Arrays:
    """Return scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; every fifth is held out for evaluation.

    Raises:
        DataError: ``root`` is given, but the digits are part of scikit-learn.
    """
    from sklearn import datasets  # pyright: ignore[reportMissingTypeStubs]

    if root:
        raise DataError(f"--data-dir {root} has no meaning for digits, which are part of scikit-learn; leave it out")

    digits = cast(_Digits, datasets.load_digits())  # pyright: ignore[reportUnknownMemberType]
    # scikit-learn stores 17 grey levels, 0 to 16
    images = torch.as_tensor(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.as_tensor(digits.target.astype(np.int64))
    held_out = torch.arange(len(labels)) % 5 == 0
    chosen = ~held_out if train else held_out
    return images[chosen], labels[chosen]


def load_fashion_mnist(root: str | None, train: bool) -> Arrays:
    """Return Fashion-MNIST: 60,000 (or 10,000 held-out) grey images of clothing, 28 × 28 pixels.

    The four files are read from ``root`` or ``root/FashionMNIST/raw``, or else from Debian's package or the cache; if
    they are not there, torchvision downloads them.

    Raises:
        DataError: a file is missing or broken, or cannot be downloaded.
    """
    part = "train" if train else "t10k"
    if root:
        folders = [Path(root), Path(root, "FashionMNIST", "raw")]
    else:
        folders = [DEBIAN_FASHION_MNIST, get_cache_folder("FashionMNIST", "raw")]
    for folder in (f for f in folders if _find_idx(f, f"{part}-images-idx3-ubyte")):
        images = read_idx(_require_idx(folder, f"{part}-images-idx3-ubyte"))[:, None]
        labels = read_idx(_require_idx(folder, f"{part}-labels-idx1-ubyte")).long()
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels; download the files again")
        return images, labels
    remedy = (
        "get it with Debian's package (`apt install dataset-fashion-mnist`), or online with torchvision "
        "(`torchvision.datasets.FashionMNIST('DIR', download=True)`, then --data-dir DIR)"
    )
    _download("FashionMNIST", root, train, remedy)
    return load_fashion_mnist(root or str(get_cache_folder()), train)


def make_cifar_loader(classes: int) -> Callable[[str | None, bool], Arrays]:
    """Return the function that loads CIFAR-10 or CIFAR-100: 50,000 (or 10,000) colour photographs of 32 × 32 pixels."""

    def load(root: str | None, train: bool) -> Arrays:
        name = f"CIFAR{classes}"
        call = f"torchvision.datasets.{name}('DIR', download=True)"
        remedy = f"download it on a machine with internet access (`{call}`), then use --data-dir DIR"
        cifar = _download(name, root, train, remedy)
        return torch.as_tensor(cifar.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(cifar.targets)

    return load


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor in the idx file at ``path``, gzipped or not.

    Raises:
        DataError: the file is not a complete idx file of bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # two zero bytes, the code of uint8, the number of axes; then each axis's length in 4 bytes
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        axes = raw[3]
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
        return torch.as_tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download the file again") from None


def _find_idx(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _require_idx(folder: Path, name: str) -> Path:
    if (path := _find_idx(folder, name)) is None:
        raise DataError(f"{folder}: {name} is missing; download the four files again")
    return path


class _Cifar(Protocol):
    data: NDArray[np.uint8]
    targets: list[int]


def _download(name: str, root: str | None, train: bool, remedy: str) -> _Cifar:
    """Return torchvision's data set ``name``, downloaded if necessary.

    The lock makes processes that start together download it once.
    """
    import torchvision  # pyright: ignore[reportMissingTypeStubs]
    from filelock import FileLock

    if root and not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; --data-dir must name an existing folder")
    folder = Path(root) if root else get_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            return getattr(torchvision.datasets, name)(folder, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} is not in {folder} and cannot be downloaded ({summarize(error)}); {remedy}") from None


def _make_spec(names: str, channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
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
GLYPHS = _make_spec(",".join(glyphs.CLASSES), 3, 32, (0.3639, 0.3308, 0.2951), (0.2448, 0.2234, 0.2046))
SMALL_SETS: dict[str, SmallSet] = {
    "digits": SmallSet(load=load_digits, spec=_make_spec("0,1,2,3,4,5,6,7,8,9", 1, 8, (0.3053,), (0.3760,))),
    "fashion-mnist": SmallSet(load=load_fashion_mnist, spec=_make_spec(FASHION, 1, 28, (0.2860,), (0.3530,))),
    "cifar10": SmallSet(
        load=make_cifar_loader(10), spec=_make_spec(CIFAR10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    ),
    "cifar100": SmallSet(
        load=make_cifar_loader(100),
        spec=_make_spec(CIFAR100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "glyphs": SmallSet(load=glyphs.make_loader(hard=False), spec=GLYPHS),
    "glyphs:hard": SmallSet(load=glyphs.make_loader(hard=True), spec=GLYPHS),
    "garments": SmallSet(
        load=garments.make_loader(load_fashion_mnist),
        spec=_make_spec(FASHION, 3, 32, (0.369, 0.331, 0.315), (0.228, 0.201, 0.201)),
    ),
}
