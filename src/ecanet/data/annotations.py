"""A COCO annotation file and its image files, checked, with one line for each problem."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ecanet.data.coco import (
    LONGEST_NAME,
    CocoImage,
    CocoObject,
    find_annotation_problem,
    find_size_problem,
    is_pixel_number,
    read_coco,
)
from ecanet.data.pictures import HOW_TO_SKIP
from ecanet.errors import DataError, show_value

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Annotations", "Picture", "clip_box", "read_annotations"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and its annotations: ``objects``, and ``crowds``, which only the evaluation uses."""

    id: int
    path: Path
    height: int
    width: int
    objects: tuple[CocoObject, ...] = ()
    crowds: tuple[CocoObject, ...] = ()


@dataclass(kw_only=True)
class Annotations:
    """A COCO data set: pictures, categories in the order of their ids, and one line for each skipped entry."""

    pictures: list[Picture]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    problems: list[str] = field(default_factory=list[str])

    def count_clipped_away(self) -> int:
        """Return the number of boxes with less than a pixel inside their image.

        The evaluation counts them as objects, as COCO does, but no training target contains them.
        """
        return sum(clip_box(o["bbox"], p.width, p.height) is None for p in self.pictures for o in p.objects)

    def to_coco(self) -> "COCO":
        """Return the pictures and annotations as pycocotools' data set, with annotations renumbered from 1."""
        from pycocotools.coco import COCO

        coco = COCO()
        # pycocotools' evaluation takes annotation number 0 for "no object"
        annotations = enumerate((a for p in self.pictures for a in (*p.objects, *p.crowds)), start=1)
        categories = zip(self.category_ids, self.class_names, strict=True)
        coco.dataset = {  # pyright: ignore[reportAttributeAccessIssue]
            "info": {},
            "images": [{"id": p.id, "height": p.height, "width": p.width} for p in self.pictures],
            "categories": [{"id": number, "name": name} for number, name in categories],
            "annotations": [{**annotation, "id": number} for number, annotation in annotations],
        }
        with redirect_stdout(None):
            coco.createIndex()
        return coco


def read_annotations(path: str | Path, images: str | Path, *, masks: bool = True, skip: bool = False) -> Annotations:
    """Return the data set in the COCO annotation file ``path`` whose image files are in the folder ``images``.

    Every image and annotation is checked: a missing image file, a box that is not finite or has no area, an unknown
    category or image, a broken mask. With ``skip`` those are left out, and listed in ``problems``. Without ``masks``
    segmentations are neither checked nor kept.

    Raises:
        DataError: the file is missing or not a COCO annotation file; without ``skip``, something in it is broken;
            or nothing in it can be used.
    """
    content, folder = read_coco(Path(path)), Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images of {path}")

    problems: list[str] = []

    def report(problem: str) -> None:
        if not skip:
            raise DataError(f"{path}: {problem}; {HOW_TO_SKIP}")
        problems.append(problem)

    usable: dict[int, CocoImage] = {}
    for image, problem in _check_images(content["images"], folder):
        if problem is None:
            usable[image["id"]] = image
        else:
            report(f"image {image['id']}: {problem}")
    unusable = {image["id"] for image in content["images"]} - set(usable)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = tuple(category["id"] for category in categories)
    objects: dict[int, list[CocoObject]] = {number: [] for number in usable}
    for annotation in content["annotations"]:
        number = annotation.get("image_id")
        if type(number) is int and number in unusable:  # the problem of its image has been reported already
            continue
        if problem := find_annotation_problem(annotation, usable, category_ids, masks=masks):
            report(f"annotation {show_value(annotation.get('id'))} of image {show_value(number)}: {problem}")
            continue
        whole = _complete(annotation, masks)
        objects[whole["image_id"]].append(whole)
    if not usable:
        raise DataError(f"{path}: none of its images is in {folder}")
    if content["annotations"] and not any(objects.values()):
        first = problems[0] if problems else "their images are missing"
        raise DataError(f"{path}: none of its {len(content['annotations'])} annotations can be used ({first})")
    return Annotations(
        pictures=[_make_picture(image, folder, objects[number]) for number, image in usable.items()],
        category_ids=category_ids,
        class_names=tuple(str(category["name"]) for category in categories),
        problems=problems,
    )


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
    """Return COCO's ``box`` (left, top, width, height) clipped to an image, as left, top, right and bottom.

    Return None if less than a pixel is left in either direction.

    >>> clip_box([15, -4, 10, 8], width=20, height=12)
    (15, 0, 20, 4)
    """
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


def _check_images(images: Sequence[CocoImage], folder: Path) -> Iterator[tuple[CocoImage, str | None]]:
    """Yield each image with a description of its problem, or None."""
    # one listing of the folder: COCO has 118,000 images, and asking for each file is slow on network disks
    names = {path.name for path in folder.iterdir()}
    for image in images:
        name = image["file_name"]
        try:
            exists = name in names or (folder / name).is_file()
        except OSError:  # the name is too long
            exists = False
        shown = (name if name.isprintable() else ascii(name))[:LONGEST_NAME]
        yield image, find_size_problem(image["width"], image["height"]) if exists else f"{folder / shown} is missing"


def _make_picture(image: CocoImage, folder: Path, annotations: Sequence[CocoObject]) -> Picture:
    objects = tuple(a for a in annotations if not a["iscrowd"])
    crowds = tuple(a for a in annotations if a["iscrowd"])
    return Picture(image["id"], folder / image["file_name"], image["height"], image["width"], objects, crowds)


def _complete(annotation: Mapping[str, object], masks: bool) -> CocoObject:
    """Return a checked annotation with the values that the evaluation needs: ``iscrowd`` and ``area``.

    The evaluation groups objects into small, medium and large by ``area``.
    """
    whole = cast(CocoObject, {**annotation, "iscrowd": int(bool(annotation.get("iscrowd")))})
    _, _, width, height = whole["bbox"]
    area = annotation.get("area")
    whole["area"] = area if is_pixel_number(area) else width * height
    if not masks:
        whole.pop("segmentation", None)
    return whole
