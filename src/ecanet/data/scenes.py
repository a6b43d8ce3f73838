"""Scenes: handwritten digits, or clothing, strewn over canvases, with boxes and masks, as a COCO folder on disk.

A detection and segmentation set that needs no download. Objects come in COCO's three sizes, overlap, and hide each
other; boxes and masks are those of what can be seen. The held-out scenes show held-out digits.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecanet.data.annotations import encode
from ecanet.data.sources import SMALL_SETS, cache_folder
from ecanet.errors import ConfigError, DataError

__all__ = ["SPRITES", "SceneConfig", "scenes", "write_scenes"]

SPRITES = ("digits", "fashion-mnist")

FEWEST_VISIBLE = 0.75
"""An object may hide others as long as this share of each can still be seen."""

SMALLEST = 20
"""Height of the smallest objects in pixels; on 16 a person takes some digits for others."""

EDITION = 2
"""In the folder's name; raised when equal values come to make other files, so that no older ones are taken for them."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """What scenes to make; equal values make equal files.

    ``side`` is the canvas's height and width in pixels. ``most`` objects at most are on one, one at least.
    """

    sprites: str = "digits"
    side: int = 128
    train: int = 6000
    held_out: int = 300
    most: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sprites not in SPRITES:
            raise ConfigError(f"scenes are made of {' or '.join(SPRITES)}, got {self.sprites!r}")
        for name, lowest in (("side", 64), ("train", 1), ("held_out", 1), ("most", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"scenes: {name} must be at least {lowest}, got {getattr(self, name)}")


def scenes(config: SceneConfig, root: str | Path | None = None) -> Path:
    """The COCO folder of ``config``'s scenes below ``root`` (default: the cache), made now if it is not there.

    Raises:
        DataError: it cannot be written, or the sprites cannot be had.
    """
    from filelock import FileLock

    place = Path(root) if root else cache_folder("scenes")
    name = "-".join(str(value) for value in (*asdict(config).values(), EDITION))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{name}.lock"):
            if not (place / name / "annotations").is_dir():
                _write_whole(config, place / name)
    except OSError as error:
        raise DataError(f"{place}: scenes cannot be written ({error}); give another folder with --data-dir") from None
    return place / name


def write_scenes(config: SceneConfig, folder: str | Path) -> None:
    """Write ``config``'s scenes into ``folder`` in COCO's layout.

    That is ``train2017/*.png``, ``val2017/*.png``, ``annotations/instances_train2017.json`` and
    ``instances_val2017.json``.
    """
    annotations = {}
    for part, (split, count) in enumerate((("train2017", config.train), ("val2017", config.held_out))):
        sprites, labels = _sprites(config, train=part == 0)
        pictures = Path(folder, split)
        pictures.mkdir(parents=True)
        # one generator for each scene: the hundredth is the same however many there are
        made = (_scene(config, sprites, labels, np.random.default_rng((config.seed, part, n))) for n in range(count))
        annotations[split] = _written(made, config, pictures)
    Path(folder, "annotations").mkdir()
    for split, content in annotations.items():
        Path(folder, "annotations", f"instances_{split}.json").write_text(json.dumps(content))


def _write_whole(config: SceneConfig, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write_scenes(config, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _written(
    made: Iterator[tuple[Pixels, list[tuple[int, Mask]]]], config: SceneConfig, folder: Path
) -> dict[str, Any]:
    """Save the scenes' pictures; the content of their annotation file."""
    from PIL import Image
    from pycocotools import mask as coco_mask

    images, annotations = [], []
    for number, (picture, objects) in enumerate(made, start=1):
        name = f"{number:012d}.png"
        Image.fromarray(picture).save(folder / name)
        images.append({"id": number, "file_name": name, "height": config.side, "width": config.side})
        for label, mask in objects:
            run_lengths = encode(mask.astype(np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [float(v) for v in coco_mask.toBbox(run_lengths)],
                    "area": float(coco_mask.area(run_lengths)),
                    "iscrowd": 0,
                    "segmentation": run_lengths,
                }
            )
    names = SMALL_SETS[config.sprites].spec.class_names
    categories = [{"id": n + 1, "name": name, "supercategory": config.sprites} for n, name in enumerate(names)]
    return {"info": asdict(config), "images": images, "annotations": annotations, "categories": categories}


def _sprites(config: SceneConfig, train: bool) -> tuple[Pixels, NDArray[np.int64]]:
    images, labels = SMALL_SETS[config.sprites].load(None, train)
    return images[:, 0].numpy(), labels.numpy()


def _scene(
    config: SceneConfig, sprites: Pixels, labels: NDArray[np.int64], random: np.random.Generator
) -> tuple[Pixels, list[tuple[int, Mask]]]:
    """One canvas (side, side, 3), and its objects from back to front: label, and mask (side, side) of what shows."""
    side = config.side
    canvas, dark = _background(side, random)
    placed: list[tuple[int, Mask, int]] = []
    for height, stretch in _sizes(side, int(random.integers(1, config.most + 1)), random):
        chosen = int(random.integers(len(sprites)))
        ink, mask = _inked(sprites[chosen], height, stretch, side)
        for _ in range(10):
            top, left = int(random.integers(side - ink.shape[0] + 1)), int(random.integers(side - ink.shape[1] + 1))
            whole = np.zeros((side, side), dtype=bool)
            whole[top : top + ink.shape[0], left : left + ink.shape[1]] = mask
            remaining = [(label, old & ~whole, area) for label, old, area in placed]
            if mask.any() and all(old.sum() >= FEWEST_VISIBLE * area for _, old, area in remaining):
                window = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
                window[:] = window * (1 - ink[..., None]) + _colour(dark, random) * ink[..., None]
                placed = [*remaining, (int(labels[chosen]), whole, int(mask.sum()))]
                break
    canvas += random.normal(0, 4, canvas.shape)
    return canvas.round().clip(0, 255).astype(np.uint8), [(label, mask) for label, mask, _ in placed]


def _sizes(side: int, count: int, random: np.random.Generator) -> Iterator[tuple[int, float | None]]:
    """Heights of the objects, the tallest first since later ones lie in front, and by how much each is widened.

    None in place of a number makes it as wide as it is tall.

    Heights are spread evenly on a logarithmic scale over small and medium; one scene in eight begins with an object
    that fills it, the only way to be large (above 96² pixels) on a canvas of 128.
    """
    if random.random() < 0.125:
        yield side - int(random.integers(0, 5)), None
        count = min(count - 1, 3)
    heights = np.exp(random.uniform(np.log(SMALLEST), np.log(0.55 * side), count))
    for height in sorted(heights, reverse=True):
        yield round(height), random.uniform(0.8, 1.2)


def _inked(sprite: Pixels, height: int, stretch: float | None, side: int) -> tuple[NDArray[np.float32], Mask]:
    """The sprite without its margins, ``height`` tall: opacity from 0 to 1 (H, W), and where it is above a half."""
    from PIL import Image

    rows, columns = np.flatnonzero(sprite.any(1)), np.flatnonzero(sprite.any(0))
    tight = sprite[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = height if stretch is None else round(height * tight.shape[1] / tight.shape[0] * stretch)
    size = (min(max(width, SMALLEST // 4), side), height)
    large = np.asarray(Image.fromarray(tight).resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    # bold where large: half of a canvas of 128 is less than 96² pixels
    ink = (large * 4 - 0.5 if stretch is None else large * 2 - 0.5).clip(0, 1)
    return ink, ink > 0.5


def _background(side: int, random: np.random.Generator) -> tuple[NDArray[np.float64], bool]:
    """A smooth canvas between two dark or two light colours, and whether it is dark."""
    dark = bool(random.random() < 0.5)
    coarse = np.stack([_colour(not dark, random, vivid=False) for _ in range(16)]).reshape(4, 4, 3)
    # bilinear, by hand: 4 × 4 colours over the canvas
    at = np.linspace(0, 3, side)
    low = at.astype(int).clip(max=2)
    share = (at - low)[:, None, None]
    rows = coarse[low] * (1 - share) + coarse[low + 1] * share
    share = share.reshape(1, side, 1)
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share, dark


def _colour(light: bool, random: np.random.Generator, vivid: bool = True) -> NDArray[np.float64]:
    """A random light or dark colour; ``vivid`` ones differ in hue too, and stand out from those that are not."""
    colour = random.uniform(90, 255, 3) if vivid else random.uniform(160, 240, 3)
    if vivid:
        colour[random.integers(3)] = random.uniform(210, 255)
    return colour if light else 255 - colour
