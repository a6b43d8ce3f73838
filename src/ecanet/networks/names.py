"""Find a network by its name, the same way for every command.

``resnet50`` is this library's, ``timm:NAME`` is timm's, ``torchvision:NAME`` is torchvision's: its classifiers,
detectors and segmentation networks. Weights are random, and nothing is downloaded.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import nn

from ecanet.errors import ConfigError
from ecanet.models import LAYERS, create_model, list_models

HOW_TO_NAME = "write NAME for this library's, torchvision:NAME or timm:NAME"


def find(name: str, **options: object) -> nn.Module:
    """Build the network called ``name`` with random weights.

    ``options`` go to `ecanet.create_model`, so they need a network of this library.

    >>> type(find("torchvision:resnet18")).__module__
    'torchvision.models.resnet'

    Raises:
        ConfigError: there is no such network or library, the library is not installed, or an option does not fit.
    """
    library, _, inner = name.rpartition(":")
    if library == "":
        build = cast(Callable[..., nn.Module], create_model)  # which checks the options itself
        return build(inner, **options)
    if options:
        raise ConfigError(f"{', '.join(options)}: only this library's networks take options, and {name!r} is not one")
    if library not in ("timm", "torchvision"):
        raise ConfigError(f"unknown library {library!r} in {name!r}; {HOW_TO_NAME}")
    build = _from_timm if library == "timm" else _from_torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about initial weights, which torchvision will change
            return build(inner)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{library} is not installed: pip install {library}") from error


def is_ours(name: str) -> bool:
    """Return whether ``name`` names a network of this library.

    >>> is_ours("resnet50"), is_ours("timm:resnet50")
    (True, False)
    """
    return ":" not in name


def image_size(name: str, model: nn.Module) -> tuple[int, int, int]:
    """Return the image size (channels, height, width) that the network ``name``, built as ``model``, is made for.

    It is torchvision's or timm's own; 32 px for this library's small-image ResNets and 224 px for the others.
    """
    library, _, inner = name.rpartition(":")
    if library == "timm":
        channels, height, width = cast(dict[str, tuple[int, int, int]], model.default_cfg)["input_size"]
        return channels, height, width
    side = 32 if inner in LAYERS and len(LAYERS[inner][1]) == 3 else 224
    if library == "torchvision":
        from torchvision.models import WeightsEnum, get_model_weights  # pyright: ignore[reportUnknownVariableType]

        newest = list(cast(Iterable[WeightsEnum], get_model_weights(inner)))[-1]
        side = getattr(newest.transforms, "keywords", {}).get("crop_size", side)  # detectors have none
    return 3, side, side


def _from_timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name)


def _from_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    if name not in list_models():
        raise _unknown("torchvision", name, list_models())
    composed = "weights_backbone" in _parameters(get_model_builder(name))  # without weights it would download those
    return get_model(name, weights=None, **({"weights_backbone": None} if composed else {}))


def _parameters(function: Callable[..., nn.Module]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _unknown(library: str, name: str, names: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {library}:{near[0]}?" if near else HOW_TO_NAME
    if not near and name in list_models():
        hint = f"{name!r} without {library}: is this library's"
    return ConfigError(f"{library} has no model {name!r}; {hint}")
