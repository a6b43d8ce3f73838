"""COCO's annotation files, read with distrust: what is wrong with one is said in a line that names it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ecanet.data.pictures import HOW_TO_SKIP
from ecanet.errors import DataError

__all__ = ["Annotations", "Picture", "clipped", "decode", "encode", "read_annotations", "thin"]

MOST_ELONGATED = 100
"""How many times the short side an image's long one may be: a network's smallest input has about as many pixels."""

LARGEST = 1e9
"""Pixels; beyond it nothing is a place on an image."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and what is on it: annotations as their file has them, with ``iscrowd`` and ``area`` filled in."""

    id: int
    path: Path
    height: int
    width: int
    objects: tuple[dict[str, Any], ...] = ()
    crowds: tuple[dict[str, Any], ...] = ()


@dataclass(kw_only=True)
class Annotations:
    """A COCO data set: pictures, categories in the order of their ids, and what was left out of it."""

    pictures: list[Picture]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    problems: list[str] = field(default_factory=list)
    """One line for each annotation or image that was skipped."""

    @property
    def degenerate(self) -> int:
        """Boxes of which less than a pixel lies on their image: the evaluation counts them, no target has them."""
        return sum(clipped(o["bbox"], p.width, p.height) is None for p in self.pictures for o in p.objects)

    def ground_truth(self) -> Any:
        """What is kept, as a ``pycocotools.coco.COCO``; annotations are numbered anew from 1."""
        from contextlib import redirect_stdout

        from pycocotools.coco import COCO

        coco: Any = COCO()
        # the evaluation takes number 0 for "no object"
        kept = enumerate((a for p in self.pictures for a in (*p.objects, *p.crowds)), start=1)
        coco.dataset = {
            "info": {},
            "images": [{"id": p.id, "height": p.height, "width": p.width} for p in self.pictures],
            "categories": [
                {"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)
            ],
            "annotations": [{**annotation, "id": number} for number, annotation in kept],
        }
        with redirect_stdout(None):
            coco.createIndex()
        return coco


def read_annotations(path: str | Path, images: str | Path, *, masks: bool = True, skip: bool = False) -> Annotations:
    """Read the COCO annotation file at ``path`` for the image files in the folder ``images``.

    What is broken (an image file that is missing, a box that is not finite or has no area, an unknown category or
    image, with ``masks`` a polygon or mask that is none) is an error, or with ``skip`` left out and kept as a line in
    ``problems``. Without ``masks`` segmentations are not looked at and not kept.

    Raises:
        DataError: the file is missing or no COCO annotation file, or what it says is broken, in one line; or nothing
            of it can be used.
    """
    content = _content(Path(path))
    folder = Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; the images of {path} are looked for there")
    there = {p.name for p in folder.iterdir()}
    found = Annotations(pictures=[], category_ids=(), class_names=())
    categories = sorted(content["categories"], key=lambda c: c["id"])
    found.category_ids = tuple(c["id"] for c in categories)
    found.class_names = tuple(str(c["name"]) for c in categories)

    def refuse(problem: str) -> None:
        if not skip:
            raise DataError(f"{path}: {problem}; {HOW_TO_SKIP}")
        found.problems.append(problem)

    known = {image["id"]: image for image in content["images"] if not _unusable(image, folder, there, refuse)}
    missing = {image["id"] for image in content["images"]} - set(known)
    lists: dict[int, tuple[list[Any], list[Any]]] = {number: ([], []) for number in known}
    for annotation in content["annotations"]:
        number = annotation.get("image_id")
        if type(number) is int and number in missing:
            continue
        if problem := _problem(annotation, known, found.category_ids, masks):
            refuse(f"annotation {annotation.get('id')} of image {number}: {problem}")
            continue
        whole = _filled_in(annotation, masks)
        lists[whole["image_id"]][bool(whole["iscrowd"])].append(whole)
    found.pictures = [
        Picture(number, folder / image["file_name"], image["height"], image["width"], *map(tuple, lists[number]))
        for number, image in known.items()
    ]
    if not found.pictures:
        raise DataError(f"{path}: not one image of it is in {folder}")
    if content["annotations"] and not any(p.objects or p.crowds for p in found.pictures):
        first = found.problems[0] if found.problems else "their images are missing"
        raise DataError(f"{path}: not one of its {len(content['annotations'])} annotations can be used ({first})")
    return found


def _unusable(image: Mapping[str, Any], folder: Path, there: set[str], refuse: Callable[[str], None]) -> bool:
    """Whether there is no such file, or nothing to see in it, which ``refuse`` is told."""
    problem = thin(image["width"], image["height"])
    if image["file_name"] not in there and not (folder / image["file_name"]).is_file():
        problem = f"{folder / image['file_name']} is missing"
    if problem:
        refuse(f"image {image['id']}: {problem}")
    return problem is not None


def clipped(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
    """COCO's ``box`` (left, top, width, height) cut to an image, as its corners; None if less than a pixel is left.

    >>> clipped([15, -4, 10, 8], width=20, height=12)
    (15, 0, 20, 4)
    """
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The mask (height, width) of polygons or run lengths that `read_annotations` has let pass."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return mask.decode(segmentation)


def encode(mask: NDArray[np.uint8]) -> Any:
    """A mask (height, width) of zeros and ones as the run lengths of COCO's files, ``size`` and ``counts``."""
    from pycocotools import mask as coco_mask

    run_lengths: Any = coco_mask.encode(np.asfortranarray(mask))
    return {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()}


# what can be wrong


def _content(path: Path) -> dict[str, Any]:
    """The file, if it is COCO's kind: lists of images and categories with all they need, and of annotations."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; coco:PATH needs PATH/annotations/instances_train2017.json") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ()}
    for key, names in needed.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: not a COCO annotation file (it has no list called {key!r})")
        for entry in entries:
            if lacking := [name for name in names if name not in entry]:
                raise DataError(f"{path}: an entry of {key!r} has no {lacking[0]!r} ({str(entry)[:60]})")
            if wrong := _wrong_kind({name: entry[name] for name in names}):
                raise DataError(f"{path}: an entry of {key!r} has {wrong} ({str(entry)[:60]})")
        twice = [i for i, n in Counter(e["id"] for e in entries if type(e.get("id")) is int).items() if n > 1]
        if twice:
            raise DataError(f"{path}: {len(twice)} ids in {key!r} are not unique, first {twice[0]!r}")
    for image in content["images"]:
        image.update(width=int(image["width"]), height=int(image["height"]))  # some write 640.0
    if not content["categories"]:
        raise DataError(f"{path}: it names no categories")
    return content


def _wrong_kind(entry: Mapping[str, Any]) -> str | None:
    """Which of an image's or a category's values is not what it must be, if any."""
    for name, value in entry.items():
        if name == "id" and type(value) is not int:
            return f"an id that is no whole number: {str(value)[:40]!r}"
        if name == "file_name" and not (isinstance(value, str) and value):
            return f"no text for a file_name: {str(value)[:40]!r}"
        if name in ("width", "height") and not (_is_number(value) and value >= 1 and value == int(value)):
            return f"a {name} that is no number of pixels: {str(value)[:40]!r}"
    return None


def thin(width: int, height: int) -> str | None:
    """What is wrong with an image of this size: resized, its short side would have no pixel left."""
    if max(width, height) <= MOST_ELONGATED * min(width, height):
        return None
    return f"{width} × {height} pixels are too thin; the long side may be {MOST_ELONGATED} times the short one"


def _problem(
    annotation: Mapping[str, Any], images: Mapping[int, Any], categories: Sequence[int], masks: bool
) -> str | None:
    """What is wrong with an annotation, if anything."""
    number = annotation.get("image_id")
    if type(number) is not int or number not in images:
        return "there is no such image"
    if annotation.get("category_id") not in categories:
        return f"unknown category {annotation.get('category_id')!r}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"the box {box!r} is not four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return f"the box {box!r} has no area"
    if not masks:
        return None
    if annotation.get("segmentation") in (None, []):
        return "it has no mask, which mask_rcnn learns from; the other detectors need none"
    image = images[number]
    return _mask_problem(annotation["segmentation"], image["height"], image["width"])


def _mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with polygons or run lengths; pycocotools would read past their end, or write past the mask's."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon needs three points or more, as x, y, x, y, …"
            if not all(_is_number(v) for v in polygon):
                return "a polygon's coordinates are not all finite numbers"
        return None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        size = segmentation.get("size") if isinstance(segmentation, dict) else segmentation
        return f"the mask's size is {str(size)[:40]}, the image's [{height}, {width}]"
    counts = segmentation.get("counts")
    lengths = list(_run_lengths(counts)) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        return "the mask's run lengths cannot be read"
    if sum(lengths) != height * width:
        return f"the mask's run lengths sum to {sum(lengths)}, not to its {height * width} pixels"
    return None


def _run_lengths(text: str) -> Iterator[int]:
    """The run lengths in COCO's compressed text: 5 bits a character, lowest first, and from the fourth number on
    differences to the number two places before."""
    before = [0, 0]
    value = shift = place = 0
    for code in text.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if place > 2:
            value += before[0]
        yield value
        before = [before[1], value]
        value, shift, place = 0, 0, place + 1
    if shift:
        # the last number breaks off
        yield -1


def _filled_in(annotation: dict[str, Any], masks: bool) -> dict[str, Any]:
    """``annotation`` with what an evaluation needs: ``iscrowd``, and ``area``, by which it sorts objects by size."""
    area, (_, _, width, height) = annotation.get("area"), annotation["bbox"]
    whole = {**annotation, "iscrowd": int(bool(annotation.get("iscrowd")))}
    whole["area"] = area if _is_number(area) else width * height
    if not masks:
        whole.pop("segmentation", None)
    return whole


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number of pixels, in which nothing overflows."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
