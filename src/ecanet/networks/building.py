"""Build any classifier by its name: with attention, weights, and a head for the classes at hand.

`load_and_attach` serves the detectors, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import nn

from ecanet.attention import Attention
from ecanet.errors import ConfigError
from ecanet.models import LoadReport
from ecanet.networks.heads import exchange_head, find_head
from ecanet.networks.loading import check_fit, load_weights
from ecanet.networks.names import find, find_kind, is_ours
from ecanet.recipes import ModelConfig
from ecanet.surgery import attach, attached

__all__ = ["Built", "build", "list_gates", "load_and_attach"]


Image = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(kw_only=True)
class Built:
    """A network, and the story of its making."""

    model: nn.Module
    name: str
    head: str
    """Name of the layer that gives the logits; empty for a detector."""
    loaded: LoadReport | None = None
    """Which tensors of the weights matched; None without weights."""
    exchanged: list[str] = field(default_factory=list[str])
    """Tensors of the head that the weights have for other classes; a classifier's start at zero."""

    def describe(self) -> list[str]:
        """Return lines that say what was loaded, exchanged and attached, and what was not."""
        lines = str(self.loaded).splitlines() if self.loaded is not None else []
        if self.exchanged:
            start = ", all zero" if self.head else ""
            lines.append(f"  new head{start}: {', '.join(self.exchanged)} (the weights are for other classes)")
        sites = attached(self.model)
        if sites:
            calls = {site.calls for site in sites}
            proof = "not proven" if None in calls else "proven: each acts as often as its place"
            lines.append(f"attached {len(sites)} gates ({sites[0].attention}), {proof}")
        lines += [f"  left out: {name} ({reason})" for name, reason in sites.left_out]
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return the same as plain values."""
        loaded = {} if self.loaded is None else {key: value for key, value in vars(self.loaded).items() if value}
        return {
            "network": self.name,
            "head": self.head,
            "weights": loaded,
            "exchanged": self.exchanged,
            "attached": [site.name for site in attached(self.model)],
            "left_out": [list(pair) for pair in attached(self.model).left_out],
        }


def build(config: ModelConfig, *, num_classes: int | None = None, image: Image = (3, 224, 224)) -> Built:
    """Build the classifier that ``config`` describes; this library's networks have gates built in, others attached.

    Args:
        config: the network, its attention and its first weights.
        num_classes: number of classes; None keeps the network's own.
        image: channels, height and width of the images. Other libraries' networks get 3 channels.

    >>> build(ModelConfig(name="torchvision:mobilenet_v2"), num_classes=3, image=(3, 64, 64)).head
    'classifier.1'

    Raises:
        ConfigError: a name or an option does not exist or does not fit, or the network is no classifier.
        AttachError: there is no place for gates.
        CheckpointError: the weights cannot be had, or are not this network's.
    """
    name, ours, wanted = config.name, is_ours(config.name), list_gates(config)
    if task := find_kind(name):
        remedy = (
            "; train it on images with boxes, coco:PATH or scenes"
            if task == "detection"
            else ", and there are no data for that here; name a classifier"
        )
        raise ConfigError(f"{name} is no classifier: it is for {task.replace('_', ' ')}{remedy}")
    if ours and config.replace is not None:
        raise ConfigError(f"replace={config.replace!r} is for other libraries' networks; in {name!r} choose attention")
    image = (image[0] if ours else 3, *image[1:])
    settings: dict[str, object] = {"in_channels": image[0]} if ours else {}
    if num_classes is not None:
        settings["num_classes"] = num_classes
    gates = {"attention": config.attention, "kernel_sizes": config.kernel_sizes, **config.options}
    if ours and config.where is None and wanted:
        return _build_in(config, find(name, **settings, **gates), settings, image)
    model = find(name, **settings, **({"attention": "none"} if ours else {}))
    built = _prepare(name, model, num_classes, image)
    weights, example = config.weights, torch.rand(2, *image, generator=torch.Generator().manual_seed(0))
    load = None if weights is None else partial(load_weights, model, name, weights)
    load_and_attach(built, load, wanted, example)
    if load is not None:
        _finish(built)
    return built


def list_gates(config: ModelConfig) -> dict[str, object]:
    """Return the arguments of `ecanet.attach` that ``config`` asks for; none for the plain network.

    Raises:
        ConfigError: the plain network has a setting for gates.
    """
    choices = {"where": config.where, "replace": config.replace, "preserve": config.preserve}
    if config.attention != "none":
        return {**choices, "attention": config.attention, "kernel_sizes": config.kernel_sizes, **config.options}
    if any(value is not None for value in choices.values()):
        raise ConfigError("where, replace and preserve are about attention, and attention is 'none'; leave them out")
    return {}


def _prepare(name: str, model: nn.Module, num_classes: int | None, image: Image) -> Built:
    """Find the head of ``model``, and exchange it if the network could not be built for ``num_classes``."""
    head, classes = find_head(model, name, image)
    if num_classes is not None and num_classes != classes:
        exchange_head(model, head, num_classes)
    return Built(model=model, name=name, head=head)


def _build_in(config: ModelConfig, model: nn.Module, settings: Mapping[str, object], image: Image) -> Built:
    """Load weights into this library's network ``model``, whose gates are part of its blocks."""
    built = _prepare(config.name, model, None, image)
    if config.weights is None:
        for module in model.modules():
            if config.preserve and isinstance(module, Attention):
                module.neutralize()
    elif config.preserve is False:
        plain = _prepare(config.name, find(config.name, attention="none", **settings), None, image)
        plain.loaded = load_weights(plain.model, config.name, config.weights)
        _finish(plain)
        model.load_state_dict(plain.model.state_dict(), strict=False)  # everything beside the gates
        built.loaded, built.exchanged = plain.loaded, plain.exchanged
    else:
        built.loaded = load_weights(model, config.name, config.weights)
        _finish(built)
    return built


def load_and_attach(
    built: Built, load: Callable[[], LoadReport] | None, wanted: Mapping[str, object], example: object
) -> None:
    """Load weights by ``load`` and attach what is ``wanted``; gates that the file holds are loaded, too."""
    if load is not None:
        built.loaded = load()
    if wanted:
        insert = cast(Callable[..., nn.Module], attach)  # which checks the options itself
        insert(built.model, example=example, **wanted)
    if load is not None and built.loaded is not None:
        gates = [f"{site.name}." for site in attached(built.model)]
        # The file of an attached network fits only now; a plain one had to be loaded before `attach` replaced parts.
        if any(gate in name for gate in gates for name in built.loaded.unexpected):
            built.loaded = load()


def _finish(built: Built) -> None:
    """Check that the weights fit, and set the tensors of a head for other classes to zero."""
    assert built.loaded is not None
    built.exchanged = check_fit(built.model, built.loaded, built.head)
    with torch.no_grad():
        for name in built.exchanged:
            built.model.get_parameter(name).zero_()
