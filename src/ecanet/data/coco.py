"""COCO's annotation format: its types, the checks of a file's content, and masks as run lengths."""

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from ecanet.errors import DataError, show_value

if TYPE_CHECKING:
    from pycocotools import _EncodedRLE  # pyright: ignore[reportPrivateUsage]

__all__ = [
    "CocoCategory",
    "CocoFile",
    "CocoImage",
    "CocoObject",
    "RunLengths",
    "decode_mask",
    "encode_mask",
    "find_annotation_problem",
    "find_size_problem",
    "is_pixel_number",
    "read_coco",
]

MAX_ASPECT_RATIO = 100
"""Largest ratio of an image's long side to its short side.

A detector resizes the long side to about 1,000 pixels, which would leave no pixel for the short side.
"""

MAX_COORDINATE = 1e9
"""Numbers beyond this many pixels cannot be coordinates on an image; pycocotools would overflow."""

FARTHEST_POINT = 10
"""Distance of a polygon's point from the image, in lengths of its long side: pycocotools' memory grows with it."""

LONGEST_OUTLINE = 1000
"""Length of a polygon, in half outlines of its image: pycocotools' memory grows with it, too."""

LARGEST_SIDE = 2**16
"""Pixels of an image's side: JPEG has no larger ones."""

LARGEST_ID = 2**63 - 1
LONGEST_NAME = 255


class CocoImage(TypedDict):
    """An image's entry in an annotation file."""

    id: int
    file_name: str
    height: int
    width: int


class CocoCategory(TypedDict):
    """A category's entry in an annotation file."""

    id: int
    name: str


class RunLengths(TypedDict):
    """A mask as run lengths, column by column, beginning with zeros: a list, or COCO's compressed text."""

    size: list[int]
    counts: list[int] | str


class CocoObject(TypedDict):
    """One annotation; ``bbox`` is left, top, width and height in pixels, and ``iscrowd`` is 0 or 1."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: NotRequired[list[list[float]] | RunLengths]


class CocoFile(TypedDict):
    """An annotation file; the annotations are not checked yet."""

    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[dict[str, object]]


def decode_mask(segmentation: list[list[float]] | RunLengths, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask (height, width) of zeros and ones that polygons or run lengths describe.

    The segmentation must have passed `find_annotation_problem`: pycocotools does not check it.
    """
    from pycocotools import mask

    # pycocotools' types leave out lists of floats and uncompressed run lengths, which the functions accept.
    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(cast("list[list[int]]", segmentation), height, width)))
    if isinstance(segmentation["counts"], list):
        return mask.decode(mask.frPyObjects(cast("_EncodedRLE", segmentation), height, width))
    return mask.decode(cast("_EncodedRLE", segmentation))


def encode_mask(mask: NDArray[np.uint8]) -> RunLengths:
    """Return a mask (height, width) of zeros and ones as COCO's compressed run lengths."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": cast(bytes, encoded["counts"]).decode()}


# checks of a file


def read_coco(path: Path) -> CocoFile:
    """Return the content of the annotation file at ``path``, with its images and categories checked.

    Raises:
        DataError: the file is missing, is not JSON, or is not a COCO annotation file.
    """
    try:
        content = cast(object, json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; coco:PATH needs PATH/annotations/instances_train2017.json") from None
    except RecursionError:
        raise DataError(f"{path}: not a COCO annotation file (its lists lie too deep in one another)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    required = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ()}
    for key, names in required.items():
        _check_entries(path, key, content, names)
    coco = cast(CocoFile, content)
    for image in coco["images"]:
        # some files have 640.0
        image.update(width=int(image["width"]), height=int(image["height"]))
    if not coco["categories"]:
        raise DataError(f"{path}: not a COCO annotation file (its list of categories is empty)")
    return coco


def _check_entries(path: Path, key: str, content: object, names: Collection[str]) -> None:
    """Raise DataError unless ``content[key]`` is a list of entries with ``names`` and with unique ids."""
    entries = _to_list(cast("dict[str, object]", content).get(key)) if isinstance(content, dict) else None
    if entries is None or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: not a COCO annotation file (it has no list called {key!r})")
    entries = cast("list[dict[str, object]]", entries)
    for entry in entries:
        if missing := [name for name in names if name not in entry]:
            raise DataError(f"{path}: an entry of {key!r} has no {missing[0]!r} ({str(entry)[:60]})")
        if problem := _find_entry_problem({name: entry[name] for name in names}):
            raise DataError(f"{path}: an entry of {key!r} has {problem} ({str(entry)[:60]})")
    counts = Counter(entry["id"] for entry in entries if type(entry.get("id")) is int)
    if duplicates := [number for number, count in counts.items() if count > 1]:
        raise DataError(f"{path}: {len(duplicates)} ids in {key!r} are not unique, first {duplicates[0]!r}")


def _find_entry_problem(entry: Mapping[str, object]) -> str | None:
    """Return a description of the first value in an image's or category's entry that has a wrong type."""
    for name, value in entry.items():
        if name == "id" and not (type(value) is int and abs(value) <= LARGEST_ID):
            return f"an id that is not an integer of 64 bits: {str(value)[:40]!r}"
        if name == "file_name" and not (isinstance(value, str) and value):
            return f"a file_name that is not a text: {str(value)[:40]!r}"
        if name == "name" and (problem := _find_name_problem(value)):
            return problem
        if name in ("width", "height") and not (is_pixel_number(value) and value >= 1 and value == int(value)):
            return f"a {name} that is not a number of pixels: {str(value)[:40]!r}"
        if name in ("width", "height") and cast(float, value) > LARGEST_SIDE:
            return f"a {name} of {value} pixels; at most {LARGEST_SIDE:,} are allowed"
    return None


def _find_name_problem(name: object) -> str | None:
    """Return a description if ``name`` cannot be a class's name: reports, files and terminals would fail on it."""
    if not isinstance(name, (str, int, float)):
        return f"a name that is not a text: {str(name)[:40]!r}"
    if len(str(name)) > LONGEST_NAME:
        return f"a name of {len(str(name))} characters; at most {LONGEST_NAME} are allowed: {str(name)[:40]!r}"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(name)):
        return f"a name with control characters: {ascii(str(name))[:60]}"
    return None


def find_size_problem(width: int, height: int) -> str | None:
    """Return a description if an image of this size is too thin for a detector, else None."""
    if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
        return None
    return f"{width} × {height} pixels are too thin; the long side may be {MAX_ASPECT_RATIO} times the short one"


def find_annotation_problem(
    annotation: Mapping[str, object], images: Mapping[int, CocoImage], categories: Collection[int], *, masks: bool
) -> str | None:
    """Return a description of the first error in an annotation, or None if it can be used.

    ``images`` are the usable images by id, and ``categories`` the known ids. The segmentation is checked if ``masks``.
    """
    number = annotation.get("image_id")
    if type(number) is not int or number not in images:
        return "its image is not in the file"
    if annotation.get("category_id") not in categories:
        return f"unknown category {show_value(annotation.get('category_id'))}"
    box = _to_numbers(annotation.get("bbox"))
    if box is None or len(box) != 4:
        return f"the box {show_value(annotation.get('bbox'))} is not four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return f"the box {box!r} has no area"
    if not masks:
        return None
    if annotation.get("segmentation") in (None, []):
        return "it has no mask, which mask_rcnn needs for training; the other detectors do not"
    return _find_mask_problem(annotation["segmentation"], images[number]["height"], images[number]["width"])


def _find_mask_problem(segmentation: object, height: int, width: int) -> str | None:
    """Return a description of the first error in polygons or run lengths.

    pycocotools would read past the end of a short polygon, and write past the end of the mask for wrong run lengths.
    """
    polygons = _to_list(segmentation)
    if polygons is not None:
        for polygon in polygons:
            coordinates = _to_list(polygon)
            if coordinates is None or len(coordinates) < 6 or len(coordinates) % 2:
                return "a polygon needs three points or more, as x, y, x, y, …"
            numbers = _to_numbers(polygon)
            if numbers is None:
                return "a polygon's coordinates are not all finite numbers"
            if (farthest := max(numbers, key=abs)) and abs(farthest) > FARTHEST_POINT * max(height, width):
                return f"a polygon has the coordinate {farthest:g}, far outside the image of {width} × {height} pixels"
            outline = sum(abs(a - b) for a, b in zip(numbers, numbers[2:] + numbers[:2], strict=True))
            if outline > LONGEST_OUTLINE * (height + width):
                return f"a polygon's outline is {outline:,.0f} pixels long in an image of {width} × {height} pixels"
        return None
    mask = cast("dict[str, object]", segmentation) if isinstance(segmentation, dict) else None
    size: object = cast(object, segmentation) if mask is None else mask.get("size")
    if mask is None or size != [height, width]:
        return f"the mask's size is {str(size)[:40]}, the image's [{height}, {width}]"
    counts = mask.get("counts")
    lengths = list(decode_run_lengths(counts)) if isinstance(counts, str) else _to_list(counts)
    if lengths is None or not all(type(n) is int and n >= 0 for n in lengths):
        return "the mask's run lengths cannot be read"
    total = sum(cast("list[int]", lengths))
    if total != height * width:
        return f"the mask's run lengths sum to {total}, not to its {height * width} pixels"
    return None


def decode_run_lengths(text: str) -> Iterator[int]:
    """Yield the run lengths in COCO's compressed text; yield -1 at the end if the last number is incomplete.

    Each character holds 5 bits of a number, the lowest first, and a bit that says whether more follow. From the fourth
    number on, the text holds the difference to the number two before.
    """
    last_two = [0, 0]
    value = shift = position = 0
    for code in text.encode():
        bits = code - 48
        if shift > 60:  # a number of millions of digits would take hours
            break
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        if position > 2:
            value += last_two[0]
        yield value
        last_two = [last_two[1], value]
        value, shift, position = 0, 0, position + 1
    if shift:
        yield -1


def is_pixel_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number within the range of coordinates."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_COORDINATE < value < MAX_COORDINATE


def _to_list(value: object) -> list[object] | None:
    return cast("list[object]", value) if isinstance(value, list) else None


def _to_numbers(value: object) -> list[float] | None:
    """Return ``value`` if it is a list of pixel numbers, else None."""
    numbers = _to_list(value)
    return cast("list[float]", numbers) if numbers is not None and all(map(is_pixel_number, numbers)) else None
