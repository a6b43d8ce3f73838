"""COCO's annotation files, read with distrust: what is wrong with one is said in a line that names it."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecanet.errors import DataError

__all__ = ["Annotations", "Picture", "decode", "encode", "read_annotations"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and what is on it: annotations as COCO writes them, boxes clipped to the image."""

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
    degenerate: int = 0
    """Boxes dropped because less than a pixel of them lies on their image."""

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


def read_annotations(path: str | Path, images: str | Path, *, skip: bool = False) -> Annotations:
    """Read the COCO annotation file at ``path`` for the image files in the folder ``images``.

    Boxes are clipped to their images; those of which less than a pixel is left are dropped and counted. What is
    broken (an image file that is missing, a box that is not finite or has no area, an unknown category or image, a
    polygon or mask that is none) is an error, or with ``skip`` left out and kept as a line in ``problems``.

    Raises:
        DataError: the file is missing or no COCO annotation file, or what it says is broken, in one line.
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
            raise DataError(f"{path}: {problem}; set data.on_corrupt=skip to go on without such annotations")
        found.problems.append(problem)

    known: dict[int, dict[str, Any]] = {}
    missing = set()
    for image in content["images"]:
        if image["file_name"] in there or (folder / image["file_name"]).is_file():
            known[image["id"]] = image
        else:
            missing.add(image["id"])
            refuse(f"image {image['id']}: {folder / image['file_name']} is missing")
    lists: dict[int, tuple[list[Any], list[Any]]] = {number: ([], []) for number in known}
    for annotation in content["annotations"]:
        if annotation.get("image_id") in missing:
            continue
        if problem := _problem(annotation, known, found.category_ids):
            refuse(f"annotation {annotation.get('id')} of image {annotation.get('image_id')}: {problem}")
            continue
        clipped = _clipped(annotation, known[annotation["image_id"]])
        if clipped is None:
            found.degenerate += 1
        else:
            lists[clipped["image_id"]][bool(clipped.get("iscrowd"))].append(clipped)
    found.pictures = [
        Picture(number, folder / image["file_name"], image["height"], image["width"], *map(tuple, lists[number]))
        for number, image in known.items()
    ]
    if not found.pictures:
        raise DataError(f"{path}: not one image of it is in {folder}")
    return found


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
        twice = [i for i, n in Counter(entry["id"] for entry in entries if "id" in entry).items() if n > 1]
        if twice:
            raise DataError(f"{path}: {len(twice)} ids in {key!r} are not unique, first {twice[0]!r}")
    if not content["categories"]:
        raise DataError(f"{path}: it names no categories")
    return content


def _problem(annotation: Mapping[str, Any], images: Mapping[int, Any], categories: Sequence[int]) -> str | None:
    """What is wrong with an annotation, if anything."""
    if annotation.get("image_id") not in images:
        return "there is no such image"
    if annotation.get("category_id") not in categories:
        return f"unknown category {annotation.get('category_id')!r}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"the box {box!r} is not four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return f"the box {box!r} has no area"
    if "segmentation" not in annotation:
        return None
    image = images[annotation["image_id"]]
    return _mask_problem(annotation["segmentation"], image["height"], image["width"])


def _mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with polygons or run lengths; pycocotools would read past their end, or write past the mask's."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon needs three points or more, as x, y, x, y, …"
            if not all(_is_number(v) for v in polygon):
                return "a polygon's coordinates are not all finite numbers"
        return None if segmentation else "the list of polygons is empty"
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


def _clipped(annotation: dict[str, Any], image: Mapping[str, Any]) -> dict[str, Any] | None:
    """``annotation`` with its box cut to the image, or None if that leaves less than a pixel of height or width."""
    x, y, width, height = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
    if right - left < 1 or bottom - top < 1:
        return None
    box = [left, top, right - left, bottom - top]
    area = annotation.get("area")
    # evaluation sorts objects by size with this
    return {**annotation, "bbox": box, "area": area if _is_number(area) else box[2] * box[3]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
