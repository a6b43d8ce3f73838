"""Weights for any network: its library's own, or a checkpoint's."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ecanet.errors import CheckpointError, summarize
from ecanet.models import LoadReport, get_torchvision_weights, load_checkpoint, load_state_dict, quiet_loggers
from ecanet.networks.names import find_library

__all__ = ["check_fit", "load_weights"]


def load_weights(model: nn.Module, name: str, weights: str | Path) -> LoadReport:
    """Load ``weights`` into ``model``, the network ``name``: "default" means its library's own, else a checkpoint.

    Tensors of another shape stay as they are; `check_fit` says whether that is right.

    Raises:
        CheckpointError: the weights do not exist, cannot be downloaded or read, fit nowhere, or are not finite.
    """
    report = _load(model, name, weights)
    if report.not_finite:
        raise CheckpointError(
            f"{report.source}: {len(report.not_finite)} of its tensors hold NaN or infinity, first "
            f"{report.not_finite[0]!r}; take another checkpoint"
        )
    return report


def _load(model: nn.Module, name: str, weights: str | Path) -> LoadReport:
    if str(weights) != "default":
        return load_checkpoint(model, weights)
    library, inner = find_library(name)
    if library == "file":
        raise CheckpointError(
            f"{name} is your own network, so it has no default weights; give the path of a checkpoint"
        )
    if library == "timm":
        return load_state_dict(model, _download_timm(model, inner), source=f"timm's weights {_describe_timm(model)}")
    member, state = get_torchvision_weights(inner)
    return load_state_dict(model, state, source=f"torchvision's weights {member}")


def check_fit(model: nn.Module, report: LoadReport, *heads: str) -> list[str]:
    """Return the tensors of the layers ``heads`` that the file has for other classes, so that they were not loaded.

    Raises:
        CheckpointError: something else of the network is not in the file or does not fit.
    """
    gates = tuple(f"{gate}." for gate in (*report.neutral, *report.acting))
    lost = [name for name in (*report.missing, *report.mismatched) if not name.startswith(gates)]
    exchanged = [name for name in lost if name.startswith(tuple(f"{head}." for head in heads))]
    if len(exchanged) < len(lost):
        first = next(name for name in lost if name not in exchanged)
        raise CheckpointError(
            f"{report.source} does not fit {type(model).__name__}: {len(lost) - len(exchanged)} tensors beside the "
            f"head are missing or of another shape, first {first!r}; check the network's name and the image's channels"
        )
    return exchanged


def _describe_timm(model: nn.Module) -> str:
    cfg = cast(Mapping[str, Any], model.pretrained_cfg)
    return str(cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("tag") or "")


def _download_timm(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state dict of timm's weights for its network ``name``, with timm's own 1,000 or more classes.

    Raises:
        CheckpointError: there are none, or they cannot be downloaded.
    """
    import timm

    create = cast(Callable[..., nn.Module], timm.create_model)
    try:
        # A download that fails is tried several times, and then reported here.
        with quiet_loggers("huggingface_hub", "timm"):
            return cast(dict[str, Tensor], create(name, pretrained=True).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        source = _describe_timm(model)
        if not source:
            raise CheckpointError(f"timm has no weights for {name!r}; give the path of a checkpoint instead") from error
        raise CheckpointError(
            f"cannot get timm's weights for {name!r} ({summarize(error)}); download {source} by other means and pass "
            f"the file's path instead of default"
        ) from error
