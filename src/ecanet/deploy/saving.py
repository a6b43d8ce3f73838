"""Write a trained network into a folder, from which another process can load it."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ecanet import inference, networks
from ecanet.deploy.model_card import PICTURE, WRITTEN_BY, Measured, write_card
from ecanet.deploy.preparation import WRAPPERS, unwrap
from ecanet.errors import CheckpointError, ConfigError, EcanetError, is_path, show_value, summarize
from ecanet.models import get_origin
from ecanet.networks import CONFIG, WEIGHTS, Preprocessing, Pretrained
from ecanet.recipes import ModelConfig, to_dict

__all__ = ["FILES", "INSTALL", "save_pretrained"]

CARD = "README.md"

FILES = (WEIGHTS, CARD, PICTURE, CONFIG)
"""The files of the folder; the last one makes it whole."""

SHARDED = ("FullyShardedDataParallel", "FSDPModule")

DType = Literal["float32", "float16", "bfloat16", "float64"]

INSTALL = "install it by pip install 'ecanet[hub]'"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    network: str | ModelConfig | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    recipe: Mapping[str, object] | None = None,
    measured: Measured | None = None,
) -> Pretrained:
    """Write the classifier ``model`` into ``folder``, from which `from_pretrained` loads it; return the description.

    The folder gets ``config.json``, ``model.safetensors`` with the tensors under the network's own names, and a model
    card. Before anything is written there, the network is built again from these files, and every tensor, every gate
    and the outputs for one random image are compared. If an error is raised, the folder is as it was.

    Args:
        model: this library's network, or another's with gates attached by one call of `ecanet.attach`, or plain.
            What torch.compile, DataParallel or DistributedDataParallel has wrapped is saved as it was before.
        folder: is made if it does not exist; files of an earlier call are replaced.
        network: the network's name, such as "torchvision:mobilenet_v2". This library's and timm's know their own.
        class_names: in the order of the logits. None takes their numbers.
        preprocessing: how an image becomes the input. None takes what the network's library says.
        recipe: the recipe of the run that trained it, as plain values.
        measured: what the card says about data, metrics and cost.

    Raises:
        ConfigError: the network cannot be built again from its name, has no weights yet or computes something else
            than its description says (by a hook, by another activation), or the folder cannot be written or holds
            files of something else, such as a project's README.md.
        CheckpointError: a tensor is not finite, or a package is missing.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"save_pretrained takes a network (a torch.nn.Module), got {show_value(model)}")
    folder = _check_folder(folder)
    if isinstance(class_names, str):
        raise ConfigError(f"class_names must be a sequence of names, got {show_value(class_names)}")
    model = _find_whole(model)
    copied = inference.copy_model(model).cpu()
    # Once loaded, a network knows what it was loaded from.
    known = cast(Pretrained | None, vars(model).get("pretrained_config"))
    name = network if known is None or network is not None else known.network.name
    config = name if isinstance(name, ModelConfig) else _describe_network(model, name)
    if preprocessing is None:
        preprocessing = networks.find_preprocessing(config.name) if known is None else known.preprocessing
    _check_channels(copied, preprocessing)
    if class_names is None:
        class_names = _number_classes(copied, config.name, preprocessing) if known is None else known.class_names
    description = Pretrained(
        library="ecanet",
        version=_find_version(),
        network=config.but(weights=None),
        dtype=_find_dtype(model),
        sites=networks.list_gate_sites(model),
        class_names=tuple(class_names),
        preprocessing=preprocessing,
        colour_order=networks.name_colour_order(preprocessing.channels),
        recipe=dict(recipe) if recipe is not None else known.recipe if known is not None else None,
    )
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".saving-") as temporary:
            made = Path(temporary)
            _write(made, model, description, measured)
            _prove(made, copied)
            folder.mkdir(exist_ok=True)
            for file in reversed(FILES):  # without its description, a half-written folder is refused
                (folder / file).unlink(missing_ok=True)
            for file in FILES:
                if (made / file).exists():
                    (made / file).replace(folder / file)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or summarize(error)})") from None
    return description


def _check_folder(folder: object) -> Path:
    """Return the path ``folder`` after checking that it holds no file of somebody else that would be replaced.

    Raises:
        ConfigError: it does, or it is no name of a folder.
    """
    if not is_path(folder) or str(folder) == "":
        raise ConfigError(f"folder must be the name of a folder, got {show_value(folder)}")
    place = Path(folder)
    found = [file for file in FILES if (place / file).exists()]
    if found and not _is_ours(place):
        raise ConfigError(
            f"{place} holds {', '.join(sorted(found))} of something else, which would be replaced; give another "
            f"folder, or move them"
        )
    return place


def _is_ours(folder: Path) -> bool:
    """Return whether `save_pretrained` has written ``folder``, completely or, before it was stopped, its card."""
    try:
        if (folder / CONFIG).exists():
            description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return isinstance(description, dict) and cast("dict[str, object]", description).get("library") == "ecanet"
        return f", {WRITTEN_BY} " in (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _find_whole(model: nn.Module) -> nn.Module:
    """Return the network that torch.compile, DataParallel or DistributedDataParallel has wrapped as a whole.

    Raises:
        ConfigError: a part of it is wrapped, or it is spread over processes, so that its tensors are others', or the
            wrapper has a hook, which would be lost.
    """
    model = unwrap(model)
    for name, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")]
        if found := next((kind for kind in kinds if kind in WRAPPERS or kind in SHARDED), None):
            raise ConfigError(
                f"{name or 'the model'} is wrapped in {found}, so that its tensors have other names or shapes; build "
                "the network anew and give it the whole state dict by ecanet.load_checkpoint, then save that"
            )
    return model


def _check_channels(model: nn.Module, images: Preprocessing) -> None:
    """Check that ``model`` takes images of as many channels as its preprocessing has.

    Raises:
        ConfigError: its first convolution takes another number, and it does not run on them.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels == images.channels:
        return
    x = torch.zeros(1, images.channels, images.size, images.size, dtype=first.weight.dtype, device="cpu")
    try:
        with torch.no_grad():
            model(x)
    except RuntimeError:
        channels = first.in_channels
        numbers = "(0.5,)" if channels == 1 else f"(0.5,) * {channels}"
        raise ConfigError(
            f"this {type(model).__name__} takes images of {channels} channel{'s' * (channels > 1)}, and its "
            f"preprocessing has {images.channels}; say what yours were: preprocessing=ecanet.networks.Preprocessing("
            f"channels={channels}, size={images.size}, mean={numbers}, std={numbers})"
        ) from None


def _describe_network(model: nn.Module, name: str | None) -> ModelConfig:
    """Return how to build ``model``, from what `create_model` and `attach` have kept in it."""
    made, calls = get_origin(model)
    name = name or cast(str | None, made.get("name")) or _find_timm_name(model)
    kind = type(model).__name__
    if name is None:
        raise ConfigError(f"this {kind} does not say what it is; name it: network='torchvision:NAME' or 'timm:NAME'")
    if len(calls) + (made.get("attention", "none") != "none") > 1:
        raise ConfigError(f"this {kind} has gates of several calls, and a folder describes one; attach all by one call")
    values = {"attention": "none", **made, **(calls[0] if calls else {}), "name": name}
    if hidden := [key for key, value in values.items() if value is False]:
        raise ConfigError(
            f"{hidden[0]}= was given as a function or a class that has no name for others; give the name of an "
            f"attention, a class of an installed package, or a pattern of module names"
        )
    return ModelConfig(**cast(dict[str, Any], values))


def _find_timm_name(model: nn.Module) -> str | None:
    cfg: object = getattr(model, "pretrained_cfg", None)
    architecture = cast(Mapping[str, object], cfg).get("architecture") if isinstance(cfg, dict) else None
    return f"timm:{architecture}" if architecture and type(model).__module__.startswith("timm.") else None


def _number_classes(model: nn.Module, name: str, made_for: Preprocessing) -> list[str]:
    """Return "0", "1", … for the logits of ``model``."""
    single = inference.copy_model(model).float()
    _, classes = networks.find_head(single, name, (made_for.channels, made_for.size, made_for.size))
    return [str(label) for label in range(classes)]


def _find_dtype(model: nn.Module) -> DType:
    """Return the dtype of the model's floating-point tensors.

    Raises:
        ConfigError: there are several, or it is one that others cannot read.
    """
    tensors = (*model.parameters(), *model.buffers())
    found = {str(value.dtype).removeprefix("torch.") for value in tensors if value.is_floating_point()}
    if len(found) != 1 or not found <= {"float32", "float16", "bfloat16", "float64"}:
        raise ConfigError(
            f"the tensors must have one floating-point dtype, got {sorted(found)}; convert them: model.float()"
        )
    return cast(DType, found.pop())


def _find_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ecanet")
    except PackageNotFoundError:  # a copy of the source that was never installed
        return "unknown"


def _write(folder: Path, model: nn.Module, description: Pretrained, measured: Measured | None) -> None:
    """Write all files of the folder."""
    try:
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

        card = write_card(description, sum(p.numel() for p in model.parameters()), measured)
    except ImportError as error:
        raise CheckpointError(f"{error.name} is missing; {INSTALL}") from error
    # Contiguous copies: safetensors stores no other layout, and no tensor twice.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in _list_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(to_dict(description), indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
    if measured is not None and measured.picture is not None:
        shutil.copyfile(measured.picture, folder / PICTURE)


def _list_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model``, which must hold tensors alone.

    Raises:
        ConfigError: something else is in it.
    """
    state = cast(dict[str, object], model.state_dict())
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ConfigError(f"{others[0]!r} in the state dict is no tensor, and a file for others holds tensors alone")
    return cast(dict[str, Tensor], state)


def _prove(folder: Path, model: nn.Module) -> None:
    """Load the network from ``folder`` and compare it with ``model``: tensors, and the outputs for a random image.

    Raises:
        ConfigError: it cannot be built from its description, or a tensor or an output differs.
        CheckpointError: a tensor is not finite.
    """
    try:
        again, config = networks.load_pretrained(folder)
    except EcanetError as error:
        text = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").partition("; take another")[0]
        raise type(error)(
            f"this {type(model).__name__} cannot be built again from its description: {text}; network= names it, "
            "class_names= its classes, preprocessing= its images"
        ) from error
    mine, theirs = _list_tensors(model), _list_tensors(again)
    for name, value in mine.items():
        if not torch.equal(value.detach().cpu(), theirs[name]) or value.dtype != theirs[name].dtype:
            raise ConfigError(f"{name!r} of {config.network.name} is not the same after loading; report this as a bug")
    images = config.preprocessing
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, images.channels, images.size, images.size, generator=generator, device="cpu").to(
        getattr(torch, config.dtype)
    )
    difference, allowed = _compare_outputs(model, again, x), torch.finfo(x.dtype).eps ** 0.5
    if not difference <= allowed:
        raise ConfigError(
            f"this {type(model).__name__} computes something else than {config.network.name} with the same weights "
            f"(off by {difference:.1e}): a hook, another activation or another forward cannot be saved"
        )


@torch.no_grad()
def _compare_outputs(model: nn.Module, again: nn.Module, x: Tensor) -> float:
    """Return the largest difference of the logits for ``x``, relative to the largest logit.

    Raises:
        ConfigError: ``model`` does not run.
    """
    try:
        mine, theirs = cast(Tensor, model(x)).double(), cast(Tensor, again(x)).double()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        shape = tuple(x.shape)
        raise ConfigError(f"this {type(model).__name__} does not run on images {shape}: {summarize(error)}") from error
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
