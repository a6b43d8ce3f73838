"""Pictures for the report, as pieces of HTML with everything inside: no file, no font, no script from elsewhere."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

__all__ = [
    "accuracy_by_class",
    "confusion",
    "curves",
    "detections",
    "draw_detections",
    "examples",
    "precision_recall",
    "to_png",
    "to_svg",
]

# matrices up to this many classes show their numbers
MOST_CLASSES_NUMBERED = 20
# tables of classes show this many at most, the worst
MOST_CLASSES_LISTED = 30
COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#ffe119"]
# red, green and blue together from which black is read more easily on a colour than white
BRIGHT = 400
# the shorter side, in pixels, that a picture with boxes on it has at least, give or take its whole factor
SMALLEST_DRAWN = 480
# to which a long side is enlarged at most
LARGEST_ENLARGED = 2000
NO_METRIC = ("epoch", "learning_rate", "images_per_second", "seconds")


def curves(history: Sequence[Mapping[str, float]]) -> str:
    """Losses, the task's metrics and the learning rate by epoch, side by side."""
    panels = [
        ("loss", [name for name in history[0] if name.endswith("loss")]),
        ("held-out metrics", [n for n in history[0] if not n.endswith("loss") and n not in NO_METRIC]),
        ("learning rate", ["learning_rate"]),
    ]
    figure = Figure(figsize=(11, 3), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot(epochs, [row[name] for row in history], marker="o", markersize=3, label=name.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False)
    return to_svg(figure)


def confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """How often each class (row) was taken for each (column); shades are shares of the row."""
    counts = torch.tensor(matrix)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    few = len(class_names) <= MOST_CLASSES_NUMBERED
    side = 2.5 + 0.5 * len(class_names) if few else 8
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    if few:
        axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
        axes.set_yticks(range(len(class_names)), class_names)
        for (row, column), count in ((at, int(counts[at])) for at in _positions(len(class_names))):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return to_svg(figure)


def accuracy_by_class(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """A bar for each class, the worst first, with what it is most often taken for."""
    rows: list[tuple[float, str, int, int, str]] = []
    for label, counts in enumerate(matrix):
        total, right = sum(counts), counts[label]
        mistakes = [(count, other) for other, count in enumerate(counts) if other != label and count]
        rival = f"{class_names[max(mistakes)[1]]} ({max(mistakes)[0]})" if mistakes else ""
        rows.append((right / total if total else 0.0, class_names[label], right, total, rival))
    rows.sort()
    lines = [
        f"<tr><td>{html.escape(name)}</td><td class=bar><i style='width:{share:.1%}'></i></td><td>{share:.1%}</td>"
        f"<td>{right} of {total}</td><td>{html.escape(rival)}</td></tr>"
        for share, name, right, total, rival in rows[:MOST_CLASSES_LISTED]
    ]
    left_out = len(rows) - len(lines)
    more = f"<p>{left_out} better classes are left out.</p>" if left_out else ""
    head = "<tr><th>class</th><th></th><th>right</th><th></th><th>most often taken for</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>{more}"


def examples(found: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> str:
    """Images with what the network said of them, and what they are where that differs."""
    cards = []
    for example in found:
        right = example["label"] == example["prediction"]
        label, prediction = (str(class_names[example[what]]) for what in ("label", "prediction"))
        said = html.escape(f"{prediction} {example['probability']:.0%}")
        truth = "" if right else f"<br>is {html.escape(label)}"
        cards.append(
            f"<figure class={'right' if right else 'wrong'}>{_to_img(example['image'])}"
            f"<figcaption>{said}{truth}</figcaption></figure>"
        )
    return f"<div class=grid>{''.join(cards)}</div>"


def precision_recall(found: Mapping[str, Sequence[float]]) -> str:
    """Precision at recall 0, 0.01, …, 1, one line for boxes and one for masks."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        axes.plot([at / 100 for at in range(len(values))], values, label=name)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return to_svg(figure)


def detections(found: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> str:
    """Images with what a detector found drawn on them, and what there is where that differs."""
    cards = []
    for example in found:
        truth = example["truth"]
        missed = None if example["right"] else truth["boxes"]
        picture = draw_detections(example["image"], example["found"], class_names, missed)
        names = ", ".join(str(class_names[label - 1]) for label in truth["labels"].tolist()) or "nothing"
        cards.append(
            f"<figure class={'right' if example['right'] else 'wrong'}>{_to_img(picture)}"
            f"<figcaption>is {html.escape(names)}</figcaption></figure>"
        )
    return f"<div class=grid>{''.join(cards)}</div>"


def draw_detections(
    image: Tensor, found: Mapping[str, Tensor], class_names: Sequence[str], truth: Tensor | None = None
) -> Tensor:
    """``image``, uint8 (3, H, W), with the boxes and masks ``found`` on it, each in a colour of its own.

    Boxes ``truth`` are white. A small image is enlarged by a whole number, so that names can be read.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    colours: Any = [COLOURS[at % len(COLOURS)] for at in range(len(found["boxes"]))]
    if colours and "masks" in found:
        image = draw_segmentation_masks(image, found["masks"][:, 0] > 0.5, alpha=0.5, colors=colours)
    factor = max(1, min(SMALLEST_DRAWN // min(image.shape[1:]), LARGEST_ENLARGED // max(image.shape[1:])))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    width = max(1, min(image.shape[1:]) // 200)
    if truth is not None and len(truth):
        image = draw_bounding_boxes(image, factor * truth, colors="white", width=width)
    if not colours:
        return image
    image = draw_bounding_boxes(image, factor * found["boxes"], colors=colours, width=width)
    names = [
        f"{class_names[label - 1]} {score:.2f}"
        for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    return _labelled(image, (factor * found["boxes"]).tolist(), names, colours)


def _labelled(image: Tensor, boxes: Sequence[Sequence[float]], names: Sequence[str], colours: Sequence[str]) -> Tensor:
    """Each name on its box's colour, above the box where there is room, and inside the picture."""
    from matplotlib.font_manager import findfont
    from PIL import ImageColor, ImageDraw, ImageFont
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    picture = to_pil_image(image)
    font = ImageFont.truetype(findfont("DejaVu Sans"), max(11, min(picture.size) // 34))
    draw = ImageDraw.Draw(picture)
    # the surest come first: they are written last, over the others
    for (left, top, _, _), name, colour in reversed(list(zip(boxes, names, colours, strict=True))):
        _, _, width, height = draw.textbbox((2, 2), name, font=font)
        at = max(0.0, min(left, picture.width - width - 2.0)), max(0.0, top - height - 2.0)
        draw.rectangle((*at, at[0] + width + 2, at[1] + height + 2), fill=colour)
        bright = sum(ImageColor.getrgb(colour)[:3]) > BRIGHT
        draw.text((at[0] + 2, at[1] + 2), name, fill="black" if bright else "white", font=font)
    return pil_to_tensor(picture)


def _positions(n: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(n) for column in range(n)]


def to_png(picture: Figure | Tensor, *, dpi: int = 120) -> bytes:
    """Return a figure, or a uint8 image (1 or 3, H, W), as a PNG file; ``dpi`` is the resolution of a figure."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=dpi)
    else:
        from torchvision.transforms.v2.functional import to_pil_image

        to_pil_image(picture).save(buffer, "png")
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page."""
    buffer = io.StringIO()
    # No date and no random identifiers: equal numbers must give equal files.
    with rc_context({"svg.hashsalt": "ecanet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _to_img(image: Tensor) -> str:
    """Return a uint8 image as an HTML element that holds its own data."""
    return f"<img src='data:image/png;base64,{base64.b64encode(to_png(image)).decode()}' alt=''>"
