"""Find a network by its name, the same way for every command.

``resnet50`` is this library's, ``timm:NAME`` is timm's, ``torchvision:NAME`` is torchvision's: its classifiers,
detectors and segmentation networks. ``FILE.py:FACTORY`` is a function in your file that returns a module. Weights are
random, and nothing is downloaded.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import nn

from ecanet.errors import ConfigError, summarize
from ecanet.models import create_model, list_models
from ecanet.networks.factories import find_factory, is_file

__all__ = ["find", "find_kind", "find_library", "is_ours", "list_names"]

HOW_TO_NAME = "write NAME for this library's, torchvision:NAME, timm:NAME or FILE.py:FACTORY"

INCEPTION = {"aux_logits": False, "transform_input": True}
"""Arguments of torchvision's Inceptions: logits alone in training, and the means that their weights expect."""


def find(name: str, **options: object) -> nn.Module:
    """Build the network called ``name`` with random weights.

    ``options`` go to `ecanet.create_model`; other networks take ``num_classes`` alone. With it torchvision's Inceptions
    return logits alone, in training too.

    >>> type(find("torchvision:resnet18")).__module__
    'torchvision.models.resnet'

    Raises:
        ConfigError: there is no such network, library or file, the library is not installed, or an option does not
            fit.
    """
    library, inner = find_library(name)
    if library == "":
        build = cast(Callable[..., nn.Module], create_model)  # which checks the options itself
        return build(inner, **options)
    if unknown := [option for option in options if option != "num_classes"]:
        raise ConfigError(f"{', '.join(unknown)}: only this library's networks take options, and {name!r} is not one")
    if library == "file":
        return _from_file(name, options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about initial weights, which torchvision will change
            return _from_timm(inner, options) if library == "timm" else _from_torchvision(inner, options)
    except ModuleNotFoundError as error:
        raise _not_installed(library) from error


def find_library(name: str) -> tuple[str, str]:
    """Return the library of the network ``name`` and its name there; "" is this library, "file" a user's own file.

    >>> find_library("timm:resnet18"), find_library("resnet18"), find_library("nets/mine.py:make")
    (('timm', 'resnet18'), ('', 'resnet18'), ('file', 'make'))

    Raises:
        ConfigError: there is no such library, or it is written in another way.
    """
    library, _, inner = name.rpartition(":")
    if is_file(name):
        return "file", inner
    if library not in ("", "timm", "torchvision"):
        raise ConfigError(f"unknown library {library!r} in {name!r}; {HOW_TO_NAME}")
    if not library and inner.startswith(("timm/", "torchvision/")):  # as other tools write it
        raise ConfigError(f"unknown model {name!r}; write {name.replace('/', ':', 1)}")
    return library, inner


def find_kind(name: str) -> str:
    """Return the task of torchvision's network ``name``: "detection", "segmentation", "video", …; else "".

    It is the part of torchvision that has the network. For classifiers and other libraries' networks it is empty.

    >>> find_kind("torchvision:fcos_resnet50_fpn"), find_kind("torchvision:resnet50"), find_kind("timm:resnet50")
    ('detection', '', '')
    """
    library, inner = find_library(name)
    if library != "torchvision":
        return ""
    from torchvision.models import get_model_builder, list_models

    parts = get_model_builder(inner).__module__.split(".") if inner in list_models() else []
    return parts[2] if len(parts) > 3 and parts[2] != "quantization" else ""  # quantized networks are classifiers


def list_names(library: str) -> list[str]:
    """Return the names of the networks of ``library``; "" is this library, and a user's own file has no list.

    >>> "resnet18" in list_names("torchvision")
    True

    Raises:
        ConfigError: the library is not installed.
    """
    try:
        if library == "timm":
            import timm

            return timm.list_models()
    except ModuleNotFoundError as error:
        raise _not_installed(library) from error
    if library == "torchvision":
        from torchvision.models import list_models as list_torchvision

        return list_torchvision()
    return list_models() if library == "" else []


def is_ours(name: str) -> bool:
    """Return whether ``name`` names a network of this library.

    >>> is_ours("resnet50"), is_ours("timm:resnet50")
    (True, False)
    """
    return ":" not in name


def _from_file(name: str, options: Mapping[str, object]) -> nn.Module:
    """Return what the user's function returns; it gets ``num_classes`` if it takes it.

    Raises:
        ConfigError: the function fails, or returns no module.
    """
    factory = find_factory(name)
    taken = {key: value for key, value in options.items() if key in _parameters(factory)}
    try:
        model = cast(object, factory(**taken))
    except Exception as error:
        raise ConfigError(f"{name} fails: {type(error).__name__}: {summarize(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _from_timm(name: str, options: Mapping[str, object]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return cast(Callable[..., nn.Module], timm.create_model)(name, **options)


def _from_torchvision(name: str, options: Mapping[str, object]) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    if name not in list_models():
        raise _unknown("torchvision", name, list_models())
    composed = "weights_backbone" in _parameters(get_model_builder(name))  # without weights it would download those
    more = (
        {"weights_backbone": None}
        if composed
        else INCEPTION
        if options and name in ("inception_v3", "googlenet")
        else {}
    )
    return get_model(name, weights=None, **more, **options)


def _not_installed(library: str) -> ConfigError:
    return ConfigError(f"{library} is not installed: pip install {library}")


def _parameters(function: Callable[..., nn.Module]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _unknown(library: str, name: str, names: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {library}:{near[0]}?" if near else HOW_TO_NAME
    if not near and name in list_models():
        hint = f"{name!r} without {library}: is this library's"
    return ConfigError(f"{library} has no model {name!r}; {hint}")
