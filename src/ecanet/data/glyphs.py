"""Glyphs: letters and digits in 345 real typefaces on real photographs, as colour images of 32 × 32 pixels.

A data set for classification that needs no download: typefaces and photographs come from Python packages. The
held-out images show typefaces of families, and photographs, that no training image shows.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version
from torch import Tensor

from ecanet.data.cache import keep_arrays, show_progress
from ecanet.data.photographs import PHOTOGRAPHS, Pixels, crop_square, load_photographs
from ecanet.data.typefaces import FAMILIES, HELD_OUT, Typeface, find_typefaces
from ecanet.errors import ConfigError

__all__ = ["CLASSES", "GlyphConfig", "load_glyphs", "make_glyphs", "make_loader"]

CLASSES = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghnqrt"
"""The classes of EMNIST's "balanced" split without I and O, which look like 1 and 0 in many typefaces.

That split has the eleven small letters whose form differs from their capital.
"""

SIZE = 32
"""Height and width of the images in pixels."""

OVERSAMPLING = 3
"""Glyphs are drawn this many times larger and averaged, so that their edges are smooth."""

EDITION = 1
"""Increase this when the generator changes, so that kept sets are made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GlyphConfig:
    """Settings of the glyph generator; equal settings make equal images.

    ``hard`` glyphs are smaller, fainter and noisier. The counts are numbers of images.
    """

    hard: bool = False
    train: int = 15_000
    held_out: int = 5_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("train", 1), ("held_out", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"glyphs: {name} must be at least {lowest}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """How hard glyphs are to read.

    ``em`` is the range of the em's size in pixels. ``contrast`` is the least difference between the brightness of the
    glyph and the mean brightness behind it, of 255. ``opacity`` is the least opacity of the glyph. ``noise`` is the
    largest standard deviation of the noise, of 255. ``turn`` and ``shear`` are standard deviations, in radians and as
    a slope.
    """

    em: tuple[float, float]
    contrast: float
    opacity: float
    noise: float
    turn: float
    shear: float


EASY = _Look(em=(24, 36), contrast=70, opacity=0.8, noise=10, turn=0.12, shear=0.12)
HARD = _Look(em=(16, 28), contrast=40, opacity=0.6, noise=16, turn=0.16, shear=0.16)


def make_loader(*, hard: bool) -> Callable[[str | None, bool], tuple[Tensor, Tensor]]:
    """Return the function that loads ``glyphs`` or ``glyphs:hard``: 15,000 training and 5,000 held-out images."""

    def load(root: str | None, train: bool) -> tuple[Tensor, Tensor]:
        # The images do not depend on the run's seed: runs with different seeds must see the same data.
        return load_glyphs(GlyphConfig(hard=hard), root, train=train)

    return load


def load_glyphs(config: GlyphConfig, root: str | None = None, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return the images (N, 3, 32, 32) and labels (N,) of one part; make them if ``root`` or the cache has none.

    Raises:
        DataError: a font package or photograph is missing, or the folder cannot be written.
    """
    part = "train" if train else "held out"
    ingredients = {
        "config": asdict(config),
        "edition": EDITION,
        "part": part,
        "families": FAMILIES,
        "held out": sorted(HELD_OUT),
        "photographs": PHOTOGRAPHS,
        # Another version of these may draw some pixels differently.
        "pillow": pillow_version,
        "freetype": features.version("freetype2"),
    }
    name = f"glyphs{'-hard' if config.hard else ''}-{part.replace(' ', '-')}"
    return keep_arrays(name, ingredients, lambda: make_glyphs(config, train=train), root)


def make_glyphs(config: GlyphConfig, *, train: bool) -> tuple[Pixels, NDArray[np.int64]]:
    """Return new images (N, 32, 32, 3) and labels (N,) of one part, with equally many images of each class.

    Raises:
        DataError: a font package or photograph is missing.
    """
    families = list(find_typefaces(train=train).values())
    photographs = load_photographs("train" if train else "held out")
    look = HARD if config.hard else EASY
    count = config.train if train else config.held_out
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for n in show_progress(range(count), f"glyphs: {count:,} {'training' if train else 'held-out'} images"):
        # Each image has its own generator: image 100 is the same however many images there are.
        random = np.random.default_rng((config.seed, int(train), n))
        # The family is drawn first: otherwise a family of 14 weights would count 14 times.
        family = families[int(random.integers(len(families)))]
        face = family[int(random.integers(len(family)))]
        glyph = _draw_glyph(face, CLASSES[labels[n]], look, random)
        images[n] = _blend(glyph, crop_square(photographs, SIZE, random), look, random)
    return images, labels


@functools.lru_cache(maxsize=512)
def _load_font(face: Typeface) -> ImageFont.FreeTypeFont:
    return face.load(SIZE * OVERSAMPLING)


def _draw_glyph(face: Typeface, text: str, look: _Look, random: np.random.Generator) -> NDArray[np.float64]:
    """Return the opacity of one glyph as (32, 32, 1), from 0 to 1: scaled, turned, sheared and moved at random."""
    side = SIZE * OVERSAMPLING
    font = _load_font(face)
    left, top, right, bottom = font.getbbox(text)
    width, height = math.ceil(right - left) + 2, math.ceil(bottom - top) + 2
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((1 - left, 1 - top), text, 255, font)
    scale = random.uniform(*look.em) / SIZE
    # A glyph larger than the image would lose the strokes that distinguish it.
    scale = min(scale, 0.9 * side / max(width, height))
    turn, shear = random.normal(0, look.turn), random.normal(0, look.shear)
    # The glyph's centre may move over 70 % of the room that its box leaves, and 2 pixels more.
    ranges = [max(0, side / 2 - scale * extent / 2) * 0.7 + 2 * OVERSAMPLING for extent in (width, height)]
    x, y = (side / 2 + random.uniform(-1, 1) * min(reach, side / 6) for reach in ranges)
    # Pillow asks for the map from the image's positions back to the glyph's: the inverse of turn · shear · scale. It
    # is written out, because a linear algebra library may round differently on another machine.
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    xx, xy, yx, yy = cos + shear * sin, sin - shear * cos, -sin, cos
    entries = (xx, xy, width / 2 - xx * x - xy * y, yx, yy, height / 2 - yx * x - yy * y)
    moved = ink.transform((side, side), Image.Transform.AFFINE, entries, Image.Resampling.BILINEAR)
    blocks = np.asarray(moved, dtype=np.float64).reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING)
    return blocks.mean((1, 3))[..., None] / 255


def _blend(
    glyph: NDArray[np.float64], background: NDArray[np.float64], look: _Look, random: np.random.Generator
) -> Pixels:
    """Return ``background`` (H, W, 3) with the glyph in a colour that is brighter or darker than what it covers."""
    covered = (background * glyph).sum((0, 1)) / max(float(glyph.sum()), 1e-9)
    # Colours are drawn until one stands out; at least a sixth of them do for any background.
    colour = random.uniform(0, 255, 3)
    while abs(_measure_brightness(colour) - _measure_brightness(covered)) < look.contrast:
        colour = random.uniform(0, 255, 3)
    opacity = glyph * random.uniform(look.opacity, 1)
    noise = random.normal(0, random.uniform(0, look.noise), background.shape)
    image = background * (1 - opacity) + colour * opacity + noise
    return image.round().clip(0, 255).astype(np.uint8)


def _measure_brightness(colour: NDArray[np.float64]) -> float:
    """Return the brightness of red, green and blue by the weights of ITU-R BT.601."""
    red, green, blue = colour.tolist()
    return 0.299 * red + 0.587 * green + 0.114 * blue
