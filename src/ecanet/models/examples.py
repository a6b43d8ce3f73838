"""An example on which `ecanet.attach` runs a network: small images for a detector, which would enlarge them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["is_detector", "small_example"]

SIDE = 64


def is_detector(model: nn.Module) -> bool:
    """Return whether ``model`` is one of torchvision's detectors, or this library's, which are built from them.

    >>> is_detector(nn.Linear(1, 1))
    False
    """
    selects = hasattr(model, "anchor_generator") or (hasattr(model, "rpn") and hasattr(model, "roi_heads"))
    return selects and hasattr(model, "transform") and hasattr(model, "backbone")


@contextmanager
def small_example(model: nn.Module) -> Generator[object]:
    """Yield an example for `ecanet.attach`; None, which leaves it to that function, if ``model`` is no detector.

    Meanwhile a detector resizes images to 64 pixels and looks at few regions. Gates depend on neither, and a run at 800
    pixels with 1,000 regions takes long.
    """
    if not is_detector(model):
        yield None
        return
    transform: Any = model.get_submodule("transform")
    regions: dict[str, int] = getattr(getattr(model, "rpn", None), "_post_nms_top_n", {})
    before = transform.min_size, transform.max_size, dict(regions)
    transform.min_size, transform.max_size = (SIDE,), SIDE
    regions.update(dict.fromkeys(regions, 4))
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    try:
        yield ([image, image],)
    finally:
        transform.min_size, transform.max_size, kept = before
        regions.update(kept)
