"""Networks with an attention slot: ECA-ResNets, ECA-MobileNetV2, and small-image ResNets."""

from pathlib import Path

from torch import nn

from ecanet.attention import check_attention
from ecanet.errors import CheckpointError, ConfigError, check_positive_int
from ecanet.models import mobilenet, placement, resnet
from ecanet.models.checkpoints import LoadReport, load_checkpoint, load_state_dict
from ecanet.models.kernel_sizes import RELEASED, KernelSizes
from ecanet.models.slots import make_slot

__all__ = ["LoadReport", "create_model", "list_models", "load_checkpoint"]


def list_models() -> list[str]:
    """Names that `create_model` takes.

    >>> list_models()[:3]
    ['resnet18', 'resnet34', 'resnet50']
    """
    return [*resnet.LAYERS, "mobilenet_v2"]


def create_model(
    name: str,
    *,
    attention: str = "eca",
    kernel_sizes: KernelSizes = "adaptive",
    num_classes: int = 1000,
    in_channels: int = 3,
    weights: str | Path | None = None,
    **options: object,
) -> nn.Module:
    """Build the network called ``name`` with ``attention`` in every block.

    Args:
        name: a name from `list_models`.
        attention: a name from `ecanet.list_attentions`; "none" builds the plain network.
        kernel_sizes: "adaptive" (Eq. 12 on each block's output channels, as in `ecanet.attach`), "official" (the
            released checkpoints'; Eq. 12 where there is none), one integer, or one integer per stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        weights: None (random), "torchvision" (ImageNet weights in the backbone and neutral gates, so that the outputs
            are the plain network's), or the path of a checkpoint. Two attentions cannot be neutral: "se-var1", which
            has no parameters, and "gsop", whose last stage keeps its resolution.
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
    check_attention(attention, options, beside=("kernel_sizes", "num_classes", "in_channels", "weights"))
    if not (weights is None or isinstance(weights, str | Path)):
        raise ConfigError(f"weights must be None, 'torchvision' or a checkpoint's path, got {weights!r}")
    shape = {
        "num_classes": check_positive_int("num_classes", num_classes),
        "in_channels": check_positive_int("in_channels", in_channels),
    }
    if name in resnet.LAYERS:
        kind, layers = resnet.LAYERS[name]
        gates = make_slot(attention, kernel_sizes, len(layers), RELEASED.get(name), options)
        model = resnet.ResNet(kind, layers, gates, **shape)
    elif name == "mobilenet_v2":
        if attention in placement.IN_RESNETS_ONLY:
            raise ConfigError(f"attention {attention!r} has a place in ResNets only, not in {name!r}")
        gates = make_slot(attention, kernel_sizes, len(mobilenet.SETTINGS), RELEASED[name], options)
        model = mobilenet.MobileNetV2(gates, **shape)
    else:
        raise ConfigError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
    if weights is not None:
        load_weights(model, name, weights)
    return model


def load_weights(model: nn.Module, name: str, weights: str | Path) -> LoadReport:
    """Load ``weights`` ("torchvision" or a path) into ``model``; a head of another size stays as it was made.

    Raises:
        CheckpointError: the weights cannot be had, or something beside head and gates is missing or does not fit.
    """
    if str(weights) == "torchvision":
        report = load_state_dict(model, torchvision_weights(name), source=f"torchvision's weights for {name}")
    else:
        report = load_checkpoint(model, weights)
    report.require_backbone()
    return report


def torchvision_weights(name: str) -> dict:
    """State dict of torchvision's best ImageNet weights for ``name``; downloaded once, to torch's hub folder.

    Raises:
        CheckpointError: torchvision has none for this network, or they cannot be downloaded.
    """
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise CheckpointError(f"torchvision has no weights for {name!r}; pass the path of a checkpoint instead")
    best = next(iter(reversed(get_model_weights(name))))  # the newest entry, torchvision's DEFAULT
    try:
        return dict(best.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise CheckpointError(
            f"cannot get torchvision's weights for {name!r} ({error}); download {best.url} by other means "
            f"and pass its path as weights="
        ) from error
