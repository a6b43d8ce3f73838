"""Build the detector of a recipe: this library's, over one of its networks, or torchvision's, with gates attached."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecanet import networks
from ecanet.attention import Attention
from ecanet.data import DataSpec, has_boxes
from ecanet.errors import ConfigError
from ecanet.models import (
    DETECTORS,
    LoadReport,
    create_detector,
    get_torchvision_weights,
    load_state_dict,
    small_example,
)
from ecanet.networks import Built, list_gates, load_and_attach
from ecanet.recipes import DetectorConfig, Recipe
from ecanet.surgery import attached

__all__ = ["StoredBatchNorm2d", "build_detector", "select_classes"]

WITHOUT_EPS = {f"torchvision:{name}_resnet50_fpn" for name in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")}
"""Detectors whose weights torchvision runs with an eps of 0 in the backbone's norms, since they were trained so."""


def build_detector(recipe: Recipe, spec: DataSpec) -> Built:
    """Build the network of a detection ``recipe`` for data of this ``spec``.

    Raises:
        ConfigError: the detector or the backbone does not exist, or a setting does not fit it.
        CheckpointError: its weights cannot be used.
    """
    if not has_boxes(recipe.data.name):
        raise ConfigError(f"detection needs annotated images, coco:PATH or scenes, got {recipe.data.name!r}")
    if networks.is_ours(recipe.model.name):
        return _build_in(recipe, spec)
    _check_detector(recipe.model.name)
    return _build_theirs(recipe, spec)


def _build_in(recipe: Recipe, spec: DataSpec) -> Built:
    """Build a detector whose backbone is one of this library's networks, with the gates in its blocks."""
    model, settings = recipe.model, recipe.detector
    for name in ("where", "replace"):
        if getattr(model, name) is not None:
            raise ConfigError(
                f"model.{name} is for classifiers and torchvision's detectors; {model.name} has its gates built in: "
                f"leave it out"
            )

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


# torchvision's detectors


def _check_detector(name: str) -> None:
    """Raise ConfigError if the network ``name`` is no detector that can be trained on boxes and masks."""
    library, inner = networks.find_library(name)
    if networks.find_kind(name) == "detection" and not inner.startswith("keypoint"):
        return
    if library == "torchvision" and inner not in networks.list_names(library):
        networks.find(name)  # says which name was meant
    missing = "it needs key points, and there are none in this data" if "keypoint" in inner else "it is no detector"
    raise ConfigError(
        f"{name} cannot be trained on boxes: {missing}; choose {', '.join(DETECTORS)} or a detector of torchvision's, "
        f"such as torchvision:fasterrcnn_resnet50_fpn"
    )


def _build_theirs(recipe: Recipe, spec: DataSpec) -> Built:
    """Build a detector of torchvision's: its weights are the whole detector's, its gates are attached and proven."""
    model, settings = recipe.model, recipe.detector
    classes, wanted = len(spec.class_names), list_gates(model)
    # Labels count from 1 in all of them, so there is one more than there are classes.
    network = networks.find(model.name, num_classes=classes + 1)
    built = Built(model=network, name=model.name, head="")
    frozen = _freeze(network, settings, model.name)
    load = None if model.weights is None else partial(_load, network, model.name, model.weights, spec.class_names)
    with small_example(network) as example:
        load_and_attach(built, load, wanted, example)
    if built.loaded is not None:
        built.exchanged = networks.check_fit(network, built.loaded, *_find_class_layers(model.name))
    for site in attached(network):
        if settings.freeze_attention and site.name.startswith(frozen):
            network.get_submodule(site.name).requires_grad_(False)
    _set_size(network, (*settings.scales, spec.size))
    return built


def _set_size(network: nn.Module, sides: tuple[int, ...]) -> None:
    """Set the short sides to which images are resized, the last one in evaluation; an SSD keeps its one size."""
    transform: Any = network.get_submodule("transform")
    if transform.fixed_size is None and sides != tuple(transform.min_size):
        transform.min_size, transform.max_size = sides, round(max(sides) * 5 / 3)


def _find_class_layers(name: str) -> set[str]:
    """Return the layers of torchvision's detector ``name`` whose shapes depend on the number of classes."""
    with torch.device("meta"):
        few, more = (networks.find(name, num_classes=number).state_dict() for number in (2, 3))
    return {key.rpartition(".")[0] for key in few if few[key].shape != more[key].shape}


def _load(network: nn.Module, name: str, weights: str, class_names: Sequence[str]) -> LoadReport:
    """Load ``weights`` into torchvision's detector ``name``: "default" means its weights for COCO.

    COCO's weights keep what they know of ``class_names``, if they know all of them.
    """
    if weights != "default":
        return networks.load_weights(network, name, weights)
    member, state = get_torchvision_weights(networks.find_library(name)[1])
    known = networks.detector_classes(name)
    if set(class_names) <= set(known):
        rows = [0, *(1 + known.index(one) for one in class_names)]
        state = select_classes(state, network.state_dict(), rows, len(known) + 1)
    return load_state_dict(network, state, source=f"torchvision's weights {member}")


def select_classes(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], rows: Sequence[int], labels: int
) -> dict[str, Tensor]:
    """Return ``state`` with the ``rows`` of its ``labels`` labels alone, where the shapes in ``own`` are smaller.

    Labels are the innermost part of a layer's outputs, after anchors, except for boxes: these have four for each label.
    """
    chosen = dict(state)
    for name, value in state.items():
        if name in own and value.shape != own[name].shape and len(value) % labels == 0:
            sides = 4 if ".bbox_pred." in name else 1
            by_label = value.reshape(-1, labels, sides, *value.shape[1:])
            chosen[name] = by_label[:, list(rows)].reshape(-1, *value.shape[1:])
    return chosen


# what is not trained


class StoredBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that keeps its stored statistics, in training too."""

    def train(self, mode: bool = True) -> "StoredBatchNorm2d":
        """Stay in evaluation mode."""
        super().train(False)
        return self


def _freeze(network: nn.Module, settings: DetectorConfig, name: str) -> tuple[str, ...]:
    """Freeze the stem and the first stages of the backbone, and the statistics of its norms, as ``settings`` say.

    Return the prefixes of the frozen parts' names.

    Raises:
        ConfigError: stages are to be frozen, and the backbone is no ResNet with that many.
    """
    backbone = network.get_submodule("backbone")
    body = getattr(backbone, "body", backbone)
    children = [child for child, _ in body.named_children()]
    stages = [child for child in children if child.startswith("layer")]
    if settings.frozen_stages > len(stages):
        have = f"has {len(stages)}" if stages else "is no ResNet: set detector.frozen_stages=0"
        raise ConfigError(f"detector.frozen_stages={settings.frozen_stages}: the backbone of {name} {have}")
    last = children.index(stages[settings.frozen_stages - 1]) if settings.frozen_stages else -1
    frozen = children[: last + 1]
    for child in frozen:
        body.get_submodule(child).requires_grad_(False)
    if settings.norm != "train":
        _keep_statistics(body, trained=settings.norm == "eval", eps=0.0 if name in WITHOUT_EPS else None)
    return tuple(f"backbone.body.{child}." for child in frozen)


def _keep_statistics(module: nn.Module, *, trained: bool, eps: float | None) -> None:
    """Replace the batch norms in ``module`` by norms that keep their statistics; None leaves their ``eps``."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _keep_statistics(child, trained=trained, eps=eps)
            continue
        stored = StoredBatchNorm2d(child.num_features, child.eps if eps is None else eps, child.momentum)
        stored.load_state_dict(child.state_dict())
        for old, new in zip(child.parameters(), stored.parameters(), strict=True):
            new.requires_grad_(trained and old.requires_grad)
        setattr(module, name, stored.eval())
