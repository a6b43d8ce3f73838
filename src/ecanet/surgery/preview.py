"""What `attach` would do to a network known by name: for the command line."""

from torch import nn

from ecanet.attach import Report, attach, attached
from ecanet.errors import ConfigError


def preview(name: str, attention: str = "eca", **options: object) -> tuple[Report, int]:
    """The gates that `attach` puts into torchvision's or timm's network ``name``, and its own parameter count.

    ``"timm/resnet50"`` asks timm; without it torchvision is asked first. Weights are random, nothing is downloaded.

    >>> report, parameters = preview("resnet50", kernel_sizes="official")
    >>> len(report), sum(site.parameters for site in report), parameters
    (16, 80, 25557032)

    Raises:
        ConfigError: neither library has such a network.
        AttachError: it has no place for the attention.
    """
    model = network(name)
    parameters = sum(p.numel() for p in model.parameters())
    return attached(attach(model, attention, **options)), parameters  # pyright: ignore[reportArgumentType]


def network(name: str) -> nn.Module:
    """torchvision's or timm's network ``name``, with random weights.

    Raises:
        ConfigError: neither library has it.
    """
    from torchvision.models import get_model, list_models

    if name in list_models():
        return get_model(name, weights=None, **({"weights_backbone": None} if is_composed(name) else {}))
    try:
        import timm
    except ImportError:
        raise ConfigError(f"torchvision has no model {name!r}, and timm is not installed: pip install timm") from None
    bare = name.removeprefix("timm/")
    if not timm.is_model(bare):
        raise ConfigError(f"neither torchvision nor timm has a model {name!r}")
    return timm.create_model(bare)


def is_composed(name: str) -> bool:
    """Whether torchvision's model ``name`` has a backbone whose weights would be downloaded."""
    import inspect

    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters
