"""Take the weights out of a run: a file of tensors, with the description that `restore` needs and no optimizer."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ecanet.errors import CheckpointError, ConfigError
from ecanet.models import read_file
from ecanet.report import Report, write_file
from ecanet.training.preparation import Description, find_description
from ecanet.training.run_dirs import read_recipe
from ecanet.training.tasks import Task

__all__ = ["WrittenWeights", "check_finished", "write_network", "write_weights"]

SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True, kw_only=True)
class WrittenWeights:
    """The weights of a run that `write_weights` has written; as a string, one line that says which they are."""

    path: str
    network: str
    attention: str
    which: str
    """"best" or "last", the epoch that was chosen."""
    epoch: int
    """Counted from 1."""
    epochs: int
    """Epochs of the whole run."""
    averaged: bool
    """The weights are averaged ones (EMA)."""
    numbers: int
    """Entries of all tensors together."""

    def __str__(self) -> str:
        kind = "averaged weights (EMA)" if self.averaged else "weights"
        return (
            f"{self.path}: {self.network} with {self.attention}, {kind} of the {self.which} epoch "
            f"({self.epoch} of {self.epochs}), {self.numbers:,} numbers"
        )


def write_weights(run: str | Path, path: str | Path, *, which: str = "best") -> WrittenWeights:
    """Write the weights of a finished run into ``path``; return which they are.

    The tensors have the network's own names. They are the averaged ones (EMA) if the run has averaged, since these are
    what it has evaluated. The file also says which network and which classes they are for, and which images of a flat
    folder they were trained on, so `restore` takes it as it takes a checkpoint.

    Args:
        run: the run's directory.
        path: ``NAME.safetensors`` (extra ``hub``), or ``NAME.pth`` with the entries ``state_dict`` and ``ecanet``.
        which: "best", the epoch with the best held-out metric, or "last".

    Raises:
        ConfigError: ``run`` is no run or not finished, or ``path`` or ``which`` is something else.
        CheckpointError: the run has no such checkpoint, it is broken, or a package is missing.
    """
    run, path = Path(run), Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: name the file {path.stem}.safetensors or {path.stem}.pth")
    check_finished(run, which)
    source = run / "checkpoints" / f"{which}.ckpt"
    content = read_file(source)
    about = find_description(source, content)
    checkpoint = cast(dict[str, object], content) if about else {}
    epoch, tensors = checkpoint.get("epoch"), checkpoint.get("state_dict")
    if about is None or not isinstance(epoch, int) or not isinstance(tensors, dict):
        missing = "ecanet" if about is None else "epoch" if not isinstance(epoch, int) else "state_dict"
        raise CheckpointError(f"{source}: not the checkpoint of a run ({missing!r} is missing); take another run")
    # Contiguous copies: safetensors stores no other layout, and no tensor twice.
    own = {
        name.removeprefix("model."): value.contiguous().clone()
        for name, value in cast(dict[object, object], tensors).items()
        if isinstance(name, str) and isinstance(value, Tensor) and name.startswith("model.")
    }
    try:
        write_file(path, _to_bytes(path, own, about.to_dict()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    recipe = about.recipe
    return WrittenWeights(
        path=str(path),
        network=recipe.model.name,
        attention=str(recipe.model.attention),
        which=which,
        epoch=epoch + 1,
        epochs=recipe.epochs,
        averaged=recipe.ema_decay is not None,
        numbers=sum(value.numel() for value in own.values()),
    )


def write_network(task: Task, path: Path) -> None:
    """Write the network of ``task`` into ``path``, in the form of `write_weights`.

    Gates that it does not have any more are neutral when `restore` reads the file, so outputs are the same.

    Raises:
        ConfigError: the file cannot be written.
        CheckpointError: safetensors is missing.
    """
    about = Description(recipe=task.recipe, spec=task.spec, split=task.split)
    state = cast("dict[str, Tensor]", task.model.state_dict())
    own = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    try:
        write_file(path, _to_bytes(path, own, about.to_dict()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def check_finished(run: Path, which: str) -> None:
    """Raise ConfigError if ``run`` is no run, or one that has not ended, or ``which`` is not "best" or "last"."""
    if which not in ("best", "last"):
        raise ConfigError(f"which weights must be best or last, got {which!r}")
    if run.is_file():
        raise ConfigError(f"{run} is a file; give the run's directory")
    began = (run / "recipe.json").exists()
    ended = (run / "metrics.json").exists()
    # A run that is being lengthened still has the report of the shorter one.
    if began and not (ended and Report.read(run).recipe.epochs == read_recipe(run).epochs):
        raise ConfigError(f"{run} is not finished; finish it (ecanet train --resume {run}), then take its weights")
    if not began:
        raise ConfigError(f"{run}: no run here (recipe.json is missing); give the directory of a run")


def _to_bytes(path: Path, tensors: dict[str, Tensor], about: object) -> bytes:
    """Return the content of a file; in a safetensors file the description is JSON in the metadata.

    Raises:
        CheckpointError: safetensors is not installed.
    """
    if path.suffix == ".pth":
        file = io.BytesIO()
        torch.save({"state_dict": tensors, "ecanet": about}, file)
        return file.getvalue()
    try:
        from safetensors.torch import save  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors; install it by pip install 'ecanet[hub]'") from error
    # Other libraries take the tensors for PyTorch's by this format.
    return save(tensors, {"format": "pt", "ecanet": json.dumps(about)})
