"""A trained network in a folder: ``config.json`` says how to build it, ``model.safetensors`` holds its tensors.

Anybody may have written such a folder. So every value is checked before it is used, no code comes from it, and a
network of more numbers than the weights' file can hold is not built.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ecanet.attention import Attention
from ecanet.errors import CheckpointError, ConfigError, EcanetError, summarize
from ecanet.models import load_checkpoint, read_file
from ecanet.networks.building import build
from ecanet.networks.factories import check_class
from ecanet.networks.loading import CONFIG, WEIGHTS, limit_numbers
from ecanet.networks.names import find_library
from ecanet.networks.preprocessing import Preprocessing
from ecanet.recipes import Config, Limits, ModelConfig, from_dict, read_json
from ecanet.surgery import attached

__all__ = [
    "Pretrained",
    "build_pretrained",
    "is_pretrained",
    "list_gate_sites",
    "load_pretrained",
    "name_colour_order",
    "read_pretrained",
]

LARGEST_CONFIG = 2**23
"""Bytes of a configuration; with 20,000 classes it has a twentieth of that."""


ColourOrder = Literal["RGB", "grey", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained(Config):
    """What ``config.json`` says about a trained classifier.

    Attributes:
        library: "ecanet"; the folders of other libraries are refused.
        version: the version of this library that wrote the folder.
        task: "classification".
        network: the network's name, its attention, and the attention's options.
        dtype: dtype of the floating-point tensors.
        sites: the gates by module name, each with its attention, channels, kernel size and gain.
        class_names: in the order of the logits.
        preprocessing: how an image becomes the network's input.
        colour_order: of the channels: "RGB", "grey" for one channel, "other" for other numbers.
        recipe: the recipe of the run that trained it, as plain values; None if it is not known.
    """

    library: Literal["ecanet"]
    version: str
    task: Literal["classification"] = "classification"
    network: ModelConfig
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    sites: dict[str, Any] = field(default_factory=dict[str, Any])
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    colour_order: ColourOrder = "RGB"
    recipe: dict[str, Any] | None = None

    LIMITS: ClassVar[Limits] = {
        "version": (None, 64),
        "class_names": (None, 1024),
    }

    def check(self) -> None:
        """Raise ConfigError if the parts do not fit each other, or the network is code of somebody's own."""
        if not self.class_names:
            raise ConfigError("class_names must have a name for each class, got none")
        if find_library(self.network.name)[0] == "file":
            raise ConfigError(
                f"network {self.network.name!r} is somebody's own code, which a folder of weights does not carry; "
                "share the file, and weights that `ecanet weights` writes"
            )
        if self.network.weights is not None:
            raise ConfigError("network.weights must be null: the folder has its own weights")
        made_for = self.preprocessing
        if not len(made_for.mean) == len(made_for.std) == made_for.channels:
            raise ConfigError(
                f"preprocessing has {made_for.channels} channels, {len(made_for.mean)} means and {len(made_for.std)} "
                "standard deviations; there must be one of each for a channel"
            )
        if made_for.interpolation not in ("bilinear", "bicubic", "nearest"):
            raise ConfigError(f"interpolation must be bilinear, bicubic or nearest, got {made_for.interpolation!r}")
        if self.colour_order != (order := name_colour_order(made_for.channels)):
            raise ConfigError(f"colour_order of {made_for.channels} channels is {order!r}, got {self.colour_order!r}")


def name_colour_order(channels: int) -> ColourOrder:
    """Return the `Pretrained.colour_order` of images with so many ``channels``.

    >>> name_colour_order(3), name_colour_order(1)
    ('RGB', 'grey')
    """
    orders: dict[int, ColourOrder] = {3: "RGB", 1: "grey"}
    return orders.get(channels, "other")


def is_pretrained(folder: str | Path) -> bool:
    """Return whether ``folder`` holds a network that `ecanet.save_pretrained` has written, or part of one."""
    return (Path(folder) / CONFIG).exists()


def read_pretrained(folder: str | Path) -> Pretrained:
    """Return what ``config.json`` in ``folder`` says, checked.

    Raises:
        CheckpointError: there is no such file, or a value in it is missing, unknown or out of bounds.
    """
    path = Path(folder) / CONFIG
    try:
        return from_dict(Pretrained, read_json(path, largest=LARGEST_CONFIG))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no network here ({CONFIG} is missing); ecanet.save_pretrained writes one"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise CheckpointError(
            f"{path}: not what ecanet.save_pretrained writes ({summarize(error)}); take another copy of the folder"
        ) from None


def build_pretrained(config: Pretrained) -> nn.Module:
    """Return the network that ``config`` describes, with random weights, in evaluation mode.

    Raises:
        ConfigError: it names something that does not exist or does not fit, or an attention that is code which nobody
            has named on this machine.
        AttachError: there is no place for its gates.
    """
    if "." in config.network.attention:
        check_class(config.network.attention)
    made_for = config.preprocessing
    image = (made_for.channels, made_for.size, made_for.size)
    # Gates begin as initialised: every weight and gain of theirs is loaded.
    settings = config.network.but(preserve=False if config.network.attention != "none" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that outputs change, which the weights undo
        built = build(settings, num_classes=len(config.class_names), image=image)
    return built.model.to(getattr(torch, config.dtype)).eval()


def load_pretrained(folder: str | Path) -> tuple[nn.Module, Pretrained]:
    """Return the network in ``folder`` with its weights, in evaluation mode, and its description.

    Raises:
        CheckpointError: a file is missing, broken or unsafe, or the two files do not belong together.
    """
    config, path = read_pretrained(folder), Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing; take another copy of the folder")
    try:
        with limit_numbers(path):
            model = build_pretrained(config)
    except CheckpointError:
        raise
    except (EcanetError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its network cannot be built: {summarize(error)}") from error
    report = load_checkpoint(model, path)
    _check_dtype(path, config.dtype)
    if not report.complete:
        wrong = (*report.mismatched, *report.missing, *report.unexpected)
        raise CheckpointError(
            f"{path}: not the weights of {config.network.name} with {config.network.attention} for "
            f"{len(config.class_names):,} classes: {len(wrong)} tensors differ, first {wrong[0]!r}; take another copy "
            "of the folder"
        )
    if report.not_finite:
        raise CheckpointError(
            f"{path}: {len(report.not_finite)} of its tensors hold NaN or infinity, first {report.not_finite[0]!r}; "
            "take another copy of the folder"
        )
    if (found := list_gate_sites(model)) != config.sites:
        names = [name for name in {**found, **config.sites} if found.get(name) != config.sites.get(name)]
        raise CheckpointError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not agree about {len(names)} gates, first {names[0]!r}; take another "
            "copy of the folder"
        )
    return model, config


def _check_dtype(path: Path, dtype: str) -> None:
    """Raise CheckpointError if a floating-point tensor of ``path`` has another dtype: loading has rounded it."""
    for name, value in cast(dict[str, object], read_file(path)).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != getattr(torch, dtype):
            raise CheckpointError(
                f"{path}: {name} is {str(value.dtype).removeprefix('torch.')}, but {CONFIG} says {dtype}; take another "
                "copy of the folder"
            )


def list_gate_sites(model: nn.Module) -> dict[str, dict[str, object]]:
    """Return the gates of ``model`` by module name, attached or built in, each with what a file says about it."""
    names = {site.name: site.attention for site in attached(model)}
    sites: dict[str, dict[str, object]] = {}
    inside = ""
    for name, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        if not (isinstance(module, Attention) or name in names) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        sites[name] = {
            "attention": names.get(name, type(module).__name__),
            "channels": getattr(module, "channels", None),
            "kernel_size": getattr(module, "kernel_size", None),
            "gain": getattr(module, "gain", None),
        }
    return sites
