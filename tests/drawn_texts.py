"""Check that what is written in a figure can be read."""

import itertools
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def find_unreadable(figure: Figure) -> list[str]:
    """Return the texts of ``figure`` that reach beyond its edge, and those that lie on one another."""
    figure.draw_without_rendering()
    texts = [one for axes in figure.axes for one in list_texts(axes)]
    texts += [one for legend in figure.legends for one in legend.get_texts()]
    texts += [one for one in (figure._suptitle,) if one is not None]
    # An annotation's own extent has its arrow, too.
    boxes = [(one.get_text(), Text.get_window_extent(one)) for one in texts if one.get_visible() and one.get_text()]
    edge = figure.bbox.padded(2)
    cut = [text for text, box in boxes if not contains(edge, box)]
    pairs = itertools.combinations(boxes, 2)
    return cut + [f"{one} on {other}" for (one, a), (other, b) in pairs if a.padded(-1).overlaps(b.padded(-1))]


def list_texts(axes: Axes) -> Iterator[Text]:
    """Yield the texts of ``axes`` that are drawn; ticks beyond the limits exist without being drawn."""
    if not axes.axison:
        yield axes.title
        return
    yield from (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
    if (legend := axes.get_legend()) is not None:
        yield from legend.get_texts()


def contains(outer: Bbox, box: Bbox) -> bool:
    return outer.x0 <= box.x0 and outer.y0 <= box.y0 and box.x1 <= outer.x1 and box.y1 <= outer.y1
