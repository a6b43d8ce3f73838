"""Run a network on shapes alone, on the meta device: what counting needs. Detectors run without selecting regions.

A detector selects regions by their scores, and shapes have no scores. So its parts run one after the other on as many
regions as it would select at most. Its cost does not depend on where they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ecanet.models import is_detector

__all__ = ["run_on_shapes"]


class _Resize(Protocol):
    """The settings of a detector's transform: it resizes images to a short side, or to one size."""

    min_size: Sequence[int]
    max_size: int
    fixed_size: tuple[int, int] | None
    size_divisible: int


class _RegionProposals(Protocol):
    head: nn.Module
    _post_nms_top_n: Mapping[str, int]


class _Pool(Protocol):
    output_size: tuple[int, int]


class _Heads(Protocol):
    """The box head of a Faster R-CNN, and the heads that a Mask or Keypoint R-CNN has beside it."""

    detections_per_img: int
    box_roi_pool: _Pool
    box_head: nn.Module
    box_predictor: nn.Module


class _TwoStage(Protocol):
    rpn: _RegionProposals
    roi_heads: _Heads


def run_on_shapes(model: nn.Module, size: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Run ``model``, which is on the meta device, on one image of ``size`` (channels, height, width)."""
    if not is_detector(model):
        model(torch.empty(1, *size, device="meta", dtype=dtype))
        return
    image = torch.empty(1, size[0], *_resize(cast(_Resize, model.get_submodule("transform")), size[1:]))
    features = cast("Tensor | Mapping[str, Tensor]", model.get_submodule("backbone")(image.to("meta", dtype)))
    levels = [features] if isinstance(features, Tensor) else list(features.values())
    if not hasattr(model, "rpn"):
        model.get_submodule("head")(levels)
        return
    _run_regions(cast(_TwoStage, model), levels)


def _resize(transform: _Resize, sides: Sequence[int]) -> list[int]:
    """Return height and width of the image that the detector makes of an image with these ``sides``."""
    if transform.fixed_size is not None:
        return [transform.fixed_size[1], transform.fixed_size[0]]
    scale = min(transform.min_size[-1] / min(sides), transform.max_size / max(sides))
    step = transform.size_divisible
    return [math.ceil(math.floor(side * scale) / step) * step for side in sides]


def _run_regions(model: _TwoStage, levels: list[Tensor]) -> None:
    """Run region proposals and heads: boxes for all proposals, masks and key points for the final detections."""
    model.rpn.head(levels)
    heads, width = model.roi_heads, levels[0].shape[1]
    regions = model.rpn._post_nms_top_n["testing"]  # pyright: ignore[reportPrivateUsage]
    like = levels[0].new_empty
    heads.box_predictor(heads.box_head(like(regions, width, *heads.box_roi_pool.output_size)))
    for kind in ("mask", "keypoint"):
        head, predictor, pool = (getattr(heads, f"{kind}_{part}", None) for part in ("head", "predictor", "roi_pool"))
        if head is not None and predictor is not None:
            size = cast(_Pool, pool).output_size
            predictor(head(like(heads.detections_per_img, width, *size)))
