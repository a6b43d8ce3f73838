"""Networks with an attention slot: ECA-ResNets, ECA-MobileNetV2, and small-image ResNets."""

import fnmatch
import inspect
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

from torch import Tensor, nn

from ecanet.attention import AttentionLike, find_attention
from ecanet.errors import CheckpointError, ConfigError, check_int, check_positive_int
from ecanet.models import mobilenet, placement, resnet
from ecanet.models.checkpoints import LoadReport, load_checkpoint, load_state_dict
from ecanet.models.kernel_sizes import RELEASED, KernelSizes
from ecanet.models.network import FeatureNetwork, Network
from ecanet.models.origin import remember_network
from ecanet.models.slots import make_slot

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

__all__ = ["LoadReport", "create_model", "list_models", "load_checkpoint"]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that `create_model` takes and that match ``pattern``, a glob.

    >>> list_models("resnet1*")
    ['resnet18', 'resnet101', 'resnet152', 'resnet14']
    """
    return fnmatch.filter([*resnet.LAYERS, "mobilenet_v2"], pattern)


@overload
def create_model(
    name: str,
    *,
    attention: AttentionLike = "eca",
    kernel_sizes: KernelSizes = "adaptive",
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: Literal[False] = False,
    out_indices: None = None,
    weights: "str | Path | WeightsEnum | None" = None,
    **options: object,
) -> Network: ...


@overload
def create_model(
    name: str,
    *,
    attention: AttentionLike = "eca",
    kernel_sizes: KernelSizes = "adaptive",
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: Literal[True],
    out_indices: Sequence[int] | None = None,
    weights: "str | Path | WeightsEnum | None" = None,
    **options: object,
) -> FeatureNetwork: ...


def create_model(
    name: str,
    *,
    attention: AttentionLike = "eca",
    kernel_sizes: KernelSizes = "adaptive",
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    weights: "str | Path | WeightsEnum | None" = None,
    **options: object,
) -> Network:
    """Build the network called ``name`` with ``attention`` in every block.

    Args:
        name: a name from `list_models`.
        attention: a name from `ecanet.list_attentions`, a class, any callable from a channel count to a module, or
            the dotted path of a class ("package.module.Class"); "none" builds the plain network.
        kernel_sizes: "adaptive" (Eq. 12 on each block's output channels, as in `ecanet.attach`), "official" (the
            released checkpoints'; Eq. 12 where there is none), one integer, or one integer per stage.
        num_classes: number of logits; 0 gives pooled features (N, num_features) without a classifier.
        in_channels: channels of the images.
        features_only: return a list of feature maps, finest first, from a network without a head, which is described by
            its ``feature_info``, as in timm.
        out_indices: with ``features_only``, the levels to return; None returns all.
        weights: None (random), "torchvision" (its newest ImageNet weights), one member of torchvision's enums
            (``ResNet50_Weights.IMAGENET1K_V1``), or the path of a checkpoint. Gates that the weights do not have are
            made neutral, so the outputs are the plain network's. That is not possible for "se-var1", which has no
            parameters, and for "gsop", whose last stage keeps its resolution. ``model.load_report`` says what
            matched; it is None without weights.
        **options: the attention's own, such as ``reduction=4`` for "se".

    >>> model = create_model("resnet50")
    >>> sum(p.numel() for p in model.parameters()) - 25_557_032
    86

    Raises:
        ConfigError: a name, option or kernel size does not exist or does not fit.
        CheckpointError: the weights cannot be had, or are not this network's.
    """
    if "pretrained" in options:
        raise ConfigError("create_model has no option 'pretrained'; weights='torchvision' is what it means here")
    attention_kind = find_attention(attention)
    attention_kind.check(options, inspect.signature(create_model).parameters)
    check_weights(weights)
    if out_indices is not None and not features_only:
        raise ConfigError(f"out_indices needs features_only=True, got out_indices={out_indices!r} without it")
    shape = {
        "num_classes": check_int("num_classes", num_classes, least=0),
        "in_channels": check_positive_int("in_channels", in_channels),
    }
    if name in resnet.LAYERS:
        kind, layers = resnet.LAYERS[name]
        gates = make_slot(attention_kind, kernel_sizes, len(layers), RELEASED.get(name), options)
        build = resnet.ResNetFeatures if features_only else resnet.ResNet
        model = build(kind, layers, gates, **shape)
    elif name == "mobilenet_v2":
        if attention_kind.name in placement.IN_RESNETS_ONLY:
            raise ConfigError(f"attention {attention_kind.name!r} has a place in ResNets only, not in {name!r}")
        gates = make_slot(attention_kind, kernel_sizes, len(mobilenet.SETTINGS), RELEASED[name], options)
        build = mobilenet.MobileNetV2Features if features_only else mobilenet.MobileNetV2
        model = build(gates, **shape)
    else:
        raise ConfigError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
    gate_settings = {"attention": attention_kind.path or False, "kernel_sizes": kernel_sizes, "options": dict(options)}
    remember_network(model, name=name, **gate_settings)
    # A plain attribute: copied with the model, and no part of its state dict.
    vars(model)["load_report"] = None if weights is None else load_weights(model, name, weights)
    if isinstance(model, FeatureNetwork):
        model.keep_levels(out_indices)
    return model


def check_weights(weights: object) -> None:
    """Check the type of ``weights`` without importing torchvision.

    Raises:
        ConfigError: it is neither None, a name or path, nor a member of one of torchvision's enums of weights.
    """
    if not (weights is None or isinstance(weights, str | Path) or is_torchvision_member(weights)):
        raise ConfigError(
            f"weights must be None, 'torchvision', a member such as ResNet50_Weights.IMAGENET1K_V1 or a checkpoint's "
            f"path, got {weights!r}"
        )


def is_torchvision_member(weights: object) -> bool:
    """Return whether ``weights`` is a member of one of torchvision's enums, such as ``ResNet50_Weights``."""
    return isinstance(weights, Enum) and any(kind.__name__ == "WeightsEnum" for kind in type(weights).__mro__)


def get_torchvision_weights(
    name: str, weights: "str | Path | WeightsEnum" = "torchvision"
) -> "tuple[str, dict[str, Tensor]]":
    """Return the name and the state dict of torchvision's newest ImageNet weights for its network ``name``.

    Raises:
        CheckpointError: there are none, or they cannot be downloaded.
    """
    member = find_torchvision_weights(name, weights)
    return str(member), download(member, name)


def load_weights(model: nn.Module, name: str, weights: "str | Path | WeightsEnum") -> LoadReport:
    """Load ``weights`` into ``model``, the network called ``name``; a head of another size stays as it was made.

    Raises:
        CheckpointError: the weights cannot be had, or something beside head and gates is missing or does not fit.
    """
    if isinstance(weights, str | Path) and str(weights) != "torchvision":
        report = load_checkpoint(model, weights)
    else:
        member, state = get_torchvision_weights(name, weights)
        report = load_state_dict(model, state, source=f"torchvision's weights {member}")
    report.require_backbone()
    return report


def find_torchvision_weights(name: str, weights: "str | Path | WeightsEnum") -> "WeightsEnum":
    """Return ``weights``, if they are an enum member of the network ``name``; for "torchvision", the newest member.

    Raises:
        CheckpointError: torchvision has no weights for this network, or the member is another network's.
    """
    from torchvision.models import get_model_weights, list_models  # pyright: ignore[reportUnknownVariableType]

    if name not in list_models():
        raise CheckpointError(f"torchvision has no weights for {name!r}; give a checkpoint's path, or none")
    members = list(cast("Iterable[WeightsEnum]", get_model_weights(name)))
    if isinstance(weights, str | Path):
        return members[-1]  # the last one is torchvision's DEFAULT
    if weights not in members:
        choices = ", ".join(map(str, members))
        raise CheckpointError(f"{weights} is not made for {name!r}; choose one of {choices}")
    return weights


def download(weights: "WeightsEnum", name: str) -> dict[str, Tensor]:
    """Return the state dict of torchvision's ``weights``; they are downloaded once, to torch's hub folder.

    Raises:
        CheckpointError: they cannot be downloaded.
    """
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise CheckpointError(
            f"cannot get torchvision's weights for {name!r} ({error}); download {weights.url} by other means "
            f"and pass its path as weights="
        ) from error
