"""Weights for any network: its library's own, or a checkpoint's."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ecanet.errors import CheckpointError, summarize
from ecanet.models import LoadReport, get_torchvision_weights, load_checkpoint, load_state_dict, quiet_loggers
from ecanet.networks.names import find_library

__all__ = ["CONFIG", "WEIGHTS", "check_fit", "find_weights", "limit_numbers", "load_weights"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a folder that `ecanet.save_pretrained` writes."""

MOST_NUMBERS = 2**24
"""Numbers of a network that may be built for the smallest file."""

PATIENCE = 5.0
"""Seconds in which the Hugging Face Hub must begin to answer before a download."""


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


def find_weights(path: str | Path) -> Path:
    """Return the file that holds the weights at ``path``: it itself, or the one in a folder of a trained network."""
    path = Path(path)
    return path / WEIGHTS if (path / CONFIG).exists() else path


def _load(model: nn.Module, name: str, weights: str | Path) -> LoadReport:
    if str(weights) != "default":
        return load_checkpoint(model, find_weights(weights))
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


@contextmanager
def limit_numbers(path: Path) -> Generator[None]:
    """Stop the building of a network, in this context, that cannot be the one whose weights the file ``path`` has.

    A file of a kilobyte may name a network of seven billion numbers, or a million classes. PyTorch reports each
    parameter before it is filled, so the memory is not yet taken.

    Raises:
        CheckpointError: the network has more numbers than the file has bytes.
    """
    most, count = path.stat().st_size + MOST_NUMBERS, 0

    def add(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count > most:
            raise CheckpointError(
                f"{path}: the network that it names has more than {most:,} numbers, and the file cannot hold them; "
                "take another checkpoint"
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _describe_timm(model: nn.Module) -> str:
    cfg = cast(Mapping[str, Any], model.pretrained_cfg)
    return str(cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("tag") or "")


def _download_timm(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state dict of timm's weights for its network ``name``, with timm's own 1,000 or more classes.

    Without a connection to the Hugging Face Hub, weights that were downloaded before are taken from its cache. Its
    client alone would try again for most of a minute before it says that there is no connection.

    Raises:
        CheckpointError: there are none, or they cannot be downloaded.
    """
    import timm

    create = cast(Callable[..., nn.Module], timm.create_model)
    cfg = cast(Mapping[str, Any], model.pretrained_cfg)
    overlay: dict[str, str] = {}
    if cfg.get("hf_hub_id") and (problem := _find_hub_problem()):
        cached = _find_cached(str(cfg["hf_hub_id"]), cfg.get("hf_hub_filename") or "pytorch_model.bin")
        if cached is None:
            raise _no_weights(model, name, problem)
        overlay["file"] = cached
    try:
        # A download that fails is tried several times, and then reported here.
        with quiet_loggers("huggingface_hub", "timm"):
            return cast(dict[str, Tensor], create(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        if not _describe_timm(model):
            raise CheckpointError(f"timm has no weights for {name!r}; give the path of a checkpoint instead") from error
        raise _no_weights(model, name, summarize(error)) from error


def _find_hub_problem() -> str | None:
    """Ask the Hugging Face Hub once for an answer, whatever it is; return what is wrong, None if it answers.

    The hub's own client asks, so that proxies, mirrors and certificates are those of the download.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the client's errors have changed their classes from version to version
        return f"{constants.ENDPOINT} does not answer: {summarize(error)}"
    return None


def _find_cached(repository: str, filename: str) -> str | None:
    """Return the path of the weights of ``repository`` (``OWNER/NAME``, or with ``@REVISION``) in the hub's cache.

    It is that of ``filename`` or, as timm prefers, of the same weights as safetensors. The repository may hold more.
    """
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    safe = filename.replace("pytorch_model.bin", "model.bin").removesuffix(".bin") + ".safetensors"
    for candidate in (safe, filename):
        found = try_to_load_from_cache(name, candidate, revision=revision or None)
        if isinstance(found, str):  # else it is not there, or known not to exist
            return found
    return None


def _no_weights(model: nn.Module, name: str, why: str) -> CheckpointError:
    cfg = cast(Mapping[str, Any], model.pretrained_cfg)
    file = f"{cfg.get('hf_hub_filename') or 'model.safetensors'} of " if cfg.get("hf_hub_id") else ""
    return CheckpointError(
        f"cannot get timm's weights for {name!r} ({why}); download {file}{_describe_timm(model)} by other means and "
        f"pass the file's path instead of default"
    )
