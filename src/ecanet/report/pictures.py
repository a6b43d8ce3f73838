"""Draw images with their classes or boxes, and tables of classes, as pieces of HTML that need no other file."""
# The annotations of torchvision leave many arguments open:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

import base64
import html
from collections.abc import Mapping, Sequence

from torch import Tensor

from ecanet.report.artifacts import DetectionExample, Example
from ecanet.report.figures import to_pil, to_png

__all__ = ["draw_detections", "show_accuracy", "show_detections", "show_examples"]

MAX_LISTED_CLASSES = 30
"""Tables of classes list at most this many, the worst ones."""

COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#ffe119"]

BRIGHT = 400
"""Sum of red, green and blue from which black text is easier to read on a colour than white text."""

MAX_SHORT_SIDE = 480
"""Images with boxes on them are enlarged by the largest integer that keeps the short side at most this long."""

MAX_LONG_SIDE = 2000
"""No image is enlarged beyond a long side of this many pixels."""


# tables and pictures


def show_accuracy(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Return a table of the accuracy of each class, the worst first, with the class it is most often taken for."""
    rows: list[tuple[float, str, int, int, str]] = []
    for label, counts in enumerate(matrix):
        total, correct = sum(counts), counts[label]
        mistakes = [(count, other) for other, count in enumerate(counts) if other != label and count]
        rival = f"{class_names[max(mistakes)[1]]} ({max(mistakes)[0]})" if mistakes else ""
        rows.append((correct / total if total else 0.0, class_names[label], correct, total, rival))
    rows.sort()
    lines = [
        f"<tr><td>{html.escape(name)}</td><td class=bar><i style='width:{share:.1%}'></i></td><td>{share:.1%}</td>"
        f"<td>{correct} of {total}</td><td>{html.escape(rival)}</td></tr>"
        for share, name, correct, total, rival in rows[:MAX_LISTED_CLASSES]
    ]
    left_out = len(rows) - len(lines)
    note = f"<p>{left_out} better classes are left out.</p>" if left_out else ""
    head = "<tr><th>class</th><th></th><th>correct</th><th></th><th>most often taken for</th></tr>"
    return f"<table class=numbers>{head}{''.join(lines)}</table>{note}"


def show_examples(examples: Sequence[Example], class_names: Sequence[str]) -> str:
    """Return images with their predictions as HTML, and with their true class where the prediction is wrong."""
    cards: list[str] = []
    for example in examples:
        label, prediction = class_names[example["label"]], class_names[example["prediction"]]
        correct = example["label"] == example["prediction"]
        caption = html.escape(f"{prediction} {example['probability']:.0%}")
        if not correct:
            caption += f"<br>is {html.escape(label)}"
        cards.append(_make_card(example["image"], caption, correct))
    return f"<div class=grid>{''.join(cards)}</div>"


def show_detections(examples: Sequence[DetectionExample], class_names: Sequence[str]) -> str:
    """Return images with the detected objects drawn on them as HTML; true boxes are drawn where there are mistakes."""
    cards: list[str] = []
    for example in examples:
        truth = example["truth"]
        boxes = None if example["right"] else truth["boxes"]
        picture = draw_detections(example["image"], example["found"], class_names, boxes)
        names = ", ".join(class_names[int(label) - 1] for label in truth["labels"]) or "nothing"
        cards.append(_make_card(picture, f"is {html.escape(names)}", example["right"]))
    return f"<div class='grid large'>{''.join(cards)}</div>"  # the names on them are to be read


def _make_card(image: Tensor, caption: str, correct: bool) -> str:
    """Return a uint8 image with its caption in HTML; the image's data are part of the element."""
    data = base64.b64encode(to_png(image)).decode()
    return (
        f"<figure class={'right' if correct else 'wrong'}><img src='data:image/png;base64,{data}' alt=''>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


# detections on an image


def draw_detections(
    image: Tensor, found: Mapping[str, Tensor], class_names: Sequence[str], truth: Tensor | None = None
) -> Tensor:
    """Return ``image``, uint8 (3, H, W), with the ``found`` boxes and masks, each object in its own colour.

    ``found`` is one image's output of torchvision's detectors: ``boxes``, ``labels`` counted from 1, ``scores``, and
    perhaps ``masks``. ``truth`` (N, 4) are boxes to draw in white. A small image is enlarged by an integer factor, so
    that the names can be read.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    colours = [COLOURS[at % len(COLOURS)] for at in range(len(found["boxes"]))]
    if colours and "masks" in found:
        image = draw_segmentation_masks(image, found["masks"][:, 0] > 0.5, alpha=0.5, colors=[*colours])
    factor = max(1, min(MAX_SHORT_SIDE // min(image.shape[1:]), MAX_LONG_SIDE // max(image.shape[1:])))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    width = max(1, min(image.shape[1:]) // 200)
    if truth is not None and len(truth):
        image = draw_bounding_boxes(image, factor * truth, colors="white", width=width)
    if not colours:
        return image
    boxes = factor * found["boxes"]
    image = draw_bounding_boxes(image, boxes, colors=[*colours], width=width)
    pairs = zip(found["labels"], found["scores"], strict=True)
    names = [f"{class_names[int(label) - 1]} {float(score):.2f}" for label, score in pairs]
    return _write_names(image, [(float(box[0]), float(box[1])) for box in boxes], names, colours)


def _write_names(
    image: Tensor, corners: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]
) -> Tensor:
    """Return ``image`` with each name above the left top corner of its box, or as close to it as the image allows."""
    from matplotlib.font_manager import findfont
    from PIL import ImageColor, ImageDraw, ImageFont
    from torchvision.transforms.v2.functional import pil_to_tensor

    picture = to_pil(image)
    font = ImageFont.truetype(findfont("DejaVu Sans"), max(11, min(picture.size) // 34))
    draw = ImageDraw.Draw(picture)
    # Detections are sorted by score. The best are written last, on top of the others.
    for (left, top), name, colour in reversed(list(zip(corners, names, colours, strict=True))):
        _, _, width, height = draw.textbbox((2, 2), name, font=font)
        x, y = max(0.0, min(left, picture.width - width - 2.0)), max(0.0, top - height - 2.0)
        draw.rectangle((x, y, x + width + 2, y + height + 2), fill=colour)
        bright = sum(ImageColor.getrgb(colour)[:3]) > BRIGHT
        draw.text((x + 2, y + 2), name, fill="black" if bright else "white", font=font)
    return pil_to_tensor(picture)
