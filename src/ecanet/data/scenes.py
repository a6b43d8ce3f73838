"""Scenes: digits or clothing placed on canvases at random, with boxes and masks, as a COCO folder on disk.

A data set for detection and segmentation that needs no download. Objects come in COCO's three sizes and hide parts of
each other; boxes and masks cover the visible parts. The held-out scenes show held-out digits.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecanet.data.coco import CocoImage, CocoObject, encode_mask
from ecanet.data.sources import SMALL_SETS
from ecanet.errors import ConfigError, DataError
from ecanet.models import get_cache_folder

__all__ = ["SPRITES", "SceneConfig", "make_scenes", "write_scenes"]

SPRITES = ("digits", "fashion-mnist")

MIN_VISIBLE = 0.75
"""Share of an object's area that the objects in front of it must leave visible."""

MIN_HEIGHT = 20
"""Height of the smallest objects in pixels; people confuse some digits at 16."""

EDITION = 2
"""Part of the folder's name: increase it when the generator changes, so that cached scenes are made again."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Objects = list[tuple[int, Mask]]
"""Label (counted from 0) and mask (side, side) of the visible part, of each object from back to front."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """Settings of the scene generator; equal settings make equal files.

    ``side`` is the canvas's height and width in pixels. A scene has from one to ``most`` objects.
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


def make_scenes(config: SceneConfig, root: str | Path | None = None) -> Path:
    """Return the COCO folder with the scenes of ``config`` below ``root`` (default: the cache); make it if necessary.

    Raises:
        DataError: the folder cannot be written, or the sprites are missing.
    """
    from filelock import FileLock

    parent = Path(root) if root else get_cache_folder("scenes")
    name = "-".join(str(value) for value in (*asdict(config).values(), EDITION))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f".{name}.lock"):
            if not (parent / name / "annotations").is_dir():
                _write_atomically(config, parent / name)
    except OSError as error:
        raise DataError(f"{parent}: scenes cannot be written ({error}); give another folder with --data-dir") from None
    return parent / name


def write_scenes(config: SceneConfig, folder: str | Path) -> None:
    """Write the scenes of ``config`` into ``folder`` in COCO's layout.

    These are ``train2017/*.png``, ``val2017/*.png``, ``annotations/instances_train2017.json`` and
    ``annotations/instances_val2017.json``.
    """
    annotations: dict[str, dict[str, object]] = {}
    for part, (split, count) in enumerate((("train2017", config.train), ("val2017", config.held_out))):
        sprites, labels = _load_sprites(config, train=part == 0)
        pictures = Path(folder, split)
        pictures.mkdir(parents=True)
        # Each scene has its own generator: scene 100 is the same however many scenes there are.
        generators = (np.random.default_rng((config.seed, part, n)) for n in range(count))
        scenes = (_draw_scene(config, sprites, labels, random) for random in generators)
        annotations[split] = _save_pictures(scenes, config, pictures)
    Path(folder, "annotations").mkdir()
    for split, content in annotations.items():
        Path(folder, "annotations", f"instances_{split}.json").write_text(json.dumps(content))


def _write_atomically(config: SceneConfig, folder: Path) -> None:
    """Write the scenes under a temporary name and rename the folder: an interruption leaves no incomplete one."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write_scenes(config, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_pictures(scenes: Iterable[tuple[Pixels, Objects]], config: SceneConfig, folder: Path) -> dict[str, object]:
    """Save the pictures of ``scenes`` in ``folder``; return the content of their annotation file."""
    from pycocotools import mask as coco_mask

    images: list[CocoImage] = []
    annotations: list[CocoObject] = []
    for number, (picture, objects) in enumerate(scenes, start=1):
        name = f"{number:012d}.png"
        Image.fromarray(picture).save(folder / name)
        images.append({"id": number, "file_name": name, "height": config.side, "width": config.side})
        for label, mask in objects:
            encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [float(v) for v in coco_mask.toBbox(encoded)],
                    "area": float(coco_mask.area(encoded)),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask.astype(np.uint8)),
                }
            )
    names = SMALL_SETS[config.sprites].spec.class_names
    categories = [{"id": n + 1, "name": name, "supercategory": config.sprites} for n, name in enumerate(names)]
    return {"info": asdict(config), "images": images, "annotations": annotations, "categories": categories}


def _load_sprites(config: SceneConfig, train: bool) -> tuple[Pixels, NDArray[np.int64]]:
    """Return the sprites (N, H, W) and their labels (N,)."""
    images, labels = SMALL_SETS[config.sprites].load(None, train)
    return np.asarray(images[:, 0]), np.asarray(labels)


def _draw_scene(
    config: SceneConfig, sprites: Pixels, labels: NDArray[np.int64], random: np.random.Generator
) -> tuple[Pixels, Objects]:
    """Return one picture (side, side, 3) and its objects."""
    side = config.side
    canvas, dark = _draw_background(side, random)
    placed: list[tuple[int, Mask, int]] = []  # label, visible mask, whole area
    for height, stretch in _choose_sizes(side, int(random.integers(1, config.most + 1)), random):
        chosen = int(random.integers(len(sprites)))
        ink, mask = _render_sprite(sprites[chosen], height, stretch, side)
        rows: int = side - ink.shape[0] + 1
        columns: int = side - ink.shape[1] + 1
        # An object that finds no free position in ten attempts is left out.
        for _ in range(10):
            top, left = int(random.integers(rows)), int(random.integers(columns))
            whole = np.zeros((side, side), dtype=bool)
            whole[top : top + ink.shape[0], left : left + ink.shape[1]] = mask
            remaining = [(label, old & ~whole, area) for label, old, area in placed]
            if mask.any() and all(old.sum() >= MIN_VISIBLE * area for _, old, area in remaining):
                window = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
                window[:] = window * (1 - ink[..., None]) + _choose_colour(dark, random) * ink[..., None]
                placed = [*remaining, (int(labels[chosen]), whole, int(mask.sum()))]
                break
    canvas += random.normal(0, 4, canvas.shape)
    return canvas.round().clip(0, 255).astype(np.uint8), [(label, mask) for label, mask, _ in placed]


def _choose_sizes(side: int, count: int, random: np.random.Generator) -> Iterator[tuple[int, float | None]]:
    """Yield the height of each object, the tallest first, and the factor by which it is stretched in width.

    A factor of None means that the object becomes as wide as it is tall. Later objects lie in front of earlier ones,
    so small objects lie in front of large ones.

    Heights are uniform on a logarithmic scale over small and medium. One scene in eight begins with an object that
    fills the canvas: on 128 pixels no other object can be large (above 96² pixels).
    """
    if random.random() < 0.125:
        yield side - int(random.integers(0, 5)), None
        count = min(count - 1, 3)
    heights = np.exp(random.uniform(np.log(MIN_HEIGHT), np.log(0.55 * side), count)).tolist()
    for height in sorted(heights, reverse=True):
        yield round(height), random.uniform(0.8, 1.2)


def _render_sprite(sprite: Pixels, height: int, stretch: float | None, side: int) -> tuple[NDArray[np.float32], Mask]:
    """Return the sprite without its margins as opacity from 0 to 1 (H, W), and the mask where it exceeds 1/2."""
    rows, columns = np.flatnonzero(sprite.any(1)), np.flatnonzero(sprite.any(0))
    tight = sprite[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = height if stretch is None else round(height * tight.shape[1] / tight.shape[0] * stretch)
    size = (min(max(width, MIN_HEIGHT // 4), side), height)
    large = np.asarray(Image.fromarray(tight).resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    # Canvas-filling objects get bold strokes: thin ones would cover less than 96² pixels and not count as large.
    ink = (large * 4 - 0.5 if stretch is None else large * 2 - 0.5).clip(0, 1)
    return ink, ink > 0.5


def _draw_background(side: int, random: np.random.Generator) -> tuple[NDArray[np.float64], bool]:
    """Return a smooth canvas (side, side, 3) of light or of dark colours, and whether it is dark."""
    dark = bool(random.random() < 0.5)
    coarse = np.stack([_choose_colour(not dark, random, vivid=False) for _ in range(16)]).reshape(4, 4, 3)
    # bilinear interpolation of 4 × 4 colours
    position = np.linspace(0, 3, side)
    low = position.astype(int).clip(max=2)
    share = (position - low)[:, None, None]
    rows = coarse[low] * (1 - share) + coarse[low + 1] * share
    share = share.reshape(1, side, 1)
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share, dark


def _choose_colour(light: bool, random: np.random.Generator, vivid: bool = True) -> NDArray[np.float64]:
    """Return a random light or dark colour; ``vivid`` colours are saturated and stand out from the others."""
    colour = random.uniform(90, 255, 3) if vivid else random.uniform(160, 240, 3)
    if vivid:
        colour[random.integers(3)] = random.uniform(210, 255)
    return colour if light else 255 - colour
