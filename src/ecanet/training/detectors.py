"""Build the detector of a recipe: this library's, over one of its networks."""

from typing import Any, cast

from torch import nn

from ecanet.attention import Attention
from ecanet.data import DataSpec, has_boxes
from ecanet.errors import ConfigError
from ecanet.models import LoadReport, create_detector
from ecanet.recipes import Recipe
from ecanet.training.building import Built

__all__ = ["build_detector"]


def build_detector(recipe: Recipe, spec: DataSpec) -> Built:
    """Build the network of a detection ``recipe`` for data of this ``spec``.

    Raises:
        ConfigError: the detector or the backbone does not exist, or a setting does not fit it.
        CheckpointError: its weights cannot be used.
    """
    if not has_boxes(recipe.data.name):
        raise ConfigError(f"detection needs annotated images, coco:PATH or scenes, got {recipe.data.name!r}")
    return _build_in(recipe, spec)


def _build_in(recipe: Recipe, spec: DataSpec) -> Built:
    """Build a detector whose backbone is one of this library's networks, with the gates in its blocks."""
    model, settings = recipe.model, recipe.detector
    for name in ("where", "replace"):
        if getattr(model, name) is not None:
            raise ConfigError(f"model.{name} is for classifiers; the detectors have their gates built in: leave it out")

    def create(attention: str, weights: str | None, **gates: Any) -> nn.Module:
        return create_detector(
            model.name,
            settings.backbone,
            num_classes=len(spec.class_names),
            attention=attention,
            weights="torchvision" if weights == "default" else weights,
            norm=settings.norm,
            frozen_stages=settings.frozen_stages,
            freeze_attention=settings.freeze_attention,
            small=settings.small,
            short_side=spec.size,
            scales=settings.scales,
            mean=spec.mean,
            std=spec.std,
            **gates,
        )

    gates = {"kernel_sizes": model.kernel_sizes, **model.options}
    if model.weights is None or model.preserve is not False:
        network = create(model.attention, model.weights, **gates)
        loaded = cast(LoadReport | None, vars(network)["load_report"])
    else:  # the gates stay as initialised, everything beside them is loaded
        network, plain = create(model.attention, None, **gates), create("none", model.weights)
        network.load_state_dict(plain.state_dict(), strict=False)
        loaded = cast(LoadReport | None, vars(plain)["load_report"])
    for module in network.modules():
        if model.preserve and model.weights is None and isinstance(module, Attention):
            module.neutralize()
    return Built(model=network, name=model.name, head="", loaded=loaded)
