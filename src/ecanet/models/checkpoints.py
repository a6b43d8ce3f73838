"""Read other people's checkpoints: the authors', timm's, torchvision's, Lightning's, plain ones."""

import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.attention import ECA, ECANS, Attention
from ecanet.errors import AttachError, CheckpointError

PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "backbone.")
"""Prefixes that DataParallel, torch.compile, Lightning and others put before every name."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which a checkpoint keeps its state dict."""


@dataclass
class LoadReport:
    """The tensors of a checkpoint that a network took, and the rest; prints as a few lines."""

    source: str
    matched: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    """Tensors of the network that the file does not have; they are left as they were."""
    unexpected: list[str] = field(default_factory=list[str])
    """Tensors of the file that the network does not have; they are ignored."""
    mismatched: list[str] = field(default_factory=list[str])
    """Tensors that have another shape in the file; they are left as they were."""
    resized: dict[str, int] = field(default_factory=dict[str, int])
    """Gates that took their kernel size from the file, with that size."""
    neutral: list[str] = field(default_factory=list[str])
    """Gates that the file does not have, made neutral: they change nothing until they are trained."""
    acting: list[str] = field(default_factory=list[str])
    """Gates that the file does not have and that cannot be neutral: a plain network's file gives other outputs."""
    head: tuple[str, ...] = ()
    """Prefix of the classifier's tensors."""

    @property
    def complete(self) -> bool:
        """True if file and network agree in every name and shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def require_backbone(self) -> None:
        """Check that everything beside the classifier and the gates was found and fits.

        Raises:
            CheckpointError: a tensor is missing or has another shape; the message names the first.
        """
        gates = tuple(name + "." for name in (*self.neutral, *self.acting))
        lost = [n for n in self.missing + self.mismatched if not n.startswith(self.head + gates)]
        if lost:
            raise CheckpointError(
                f"{self.source} does not fit this network: {len(lost)} tensors are missing or of another shape, "
                f"first {lost[0]!r}; check the model's name, attention and in_channels"
            )

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors matched"]
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "neutral": self.neutral,
            "acting": self.acting,
        }
        for title, names in groups.items():
            if names:
                lines.append(f"  {title}: {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        if self.resized:
            sizes = ", ".join(f"{name} k={k}" for name, k in list(self.resized.items())[:3])
            lines.append(f"  kernel sizes taken from the file: {len(self.resized)} ({sizes}…)")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, checkpoint: str | Path | Mapping[str, object]) -> LoadReport:
    """Load ``checkpoint``, a path or a state dict, into ``model``; return a report of what matched.

    Reads the authors' files (DataParallel's ``module.``, a ``state_dict`` inside), timm's (``se.conv.weight`` for
    ECA), Lightning's and plain ones. ECA kernel sizes are taken from the file's tensors; other metadata (an ``arch``
    tag) is ignored. Gates absent from the file are made neutral, so an old plain checkpoint gives its old outputs.
    Tensors of another shape (a head for other classes) are reported and left as they were.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint or would run code, or the state dict shares
            no name with the network.
    """
    if isinstance(checkpoint, str | Path):
        content, source = read_file(checkpoint), str(checkpoint)
    else:
        content, source = checkpoint, "the state dict"
    return load_state_dict(model, find_state_dict(content, source), source=source)


def find_state_dict(content: object, source: str) -> dict[str, Tensor]:
    """Return the state dict in ``content``, alone or under one of `WRAPPERS`, with its names unchanged.

    Raises:
        CheckpointError: ``content`` has no named tensors; the message calls it ``source``.
    """
    entries: dict[object, object] = dict(cast("Mapping[object, object]", content)) if is_mapping(content) else {}
    inside = next((entries[key] for key in WRAPPERS if is_mapping(entries.get(key))), None)
    if inside is not None:
        entries = dict(cast("Mapping[object, object]", inside))
    state = {str(name): tensor for name, tensor in entries.items() if isinstance(tensor, Tensor)}
    if not state:
        raise CheckpointError(f"{source} holds no state dict, a dictionary of names and tensors")
    return state


def is_mapping(content: object) -> bool:
    """Return whether ``content`` is a dictionary or another mapping."""
    return isinstance(content, Mapping)


def read_file(path: str | Path) -> object:
    """Return the content of the file ``path``; never run code from it.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] not in (b"P", b"\x80"):  # neither a zip archive nor a pickle
            raise CheckpointError(f"{path} is not a checkpoint") from error
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "Unsupported" in line), lines[0])[:120]
        raise CheckpointError(
            f"{path} was not loaded, since it may run code and not only hold weights: {reason}"
        ) from error
    except Exception as error:  # whatever torch's reader meets in a damaged file
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({summarize(error)})") from error


def summarize(error: Exception) -> str:
    """Return the first line of an error's message, at most 120 characters, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "the state dict") -> LoadReport:
    """Load ``state`` into ``model`` under the rules of `load_checkpoint`.

    Raises:
        CheckpointError: no name of ``state`` fits the network.
    """
    state = rename(state, model)
    if not state.keys() & model.state_dict().keys():
        first = next(iter(state), "none")
        raise CheckpointError(f"{source} shares no tensor name with this network (its first is {first!r})")
    report = LoadReport(source, head=find_head(model))
    report.resized = resize_kernels(model, state)
    for name, gate in find_gates(model).items():
        if any(key.startswith(name + ".") for key in state):
            continue
        (report.neutral if try_neutralize(gate) else report.acting).append(name)
    own = model.state_dict()
    report.mismatched = [k for k in state if k in own and own[k].shape != state[k].shape]
    fitting = {k: v for k, v in state.items() if k not in report.mismatched}
    missing, unexpected = cast("tuple[list[str], list[str]]", model.load_state_dict(fitting, strict=False))
    report.unexpected = list(unexpected)
    report.missing = [k for k in missing if k not in report.mismatched]
    report.matched = [k for k in fitting if k not in report.unexpected]
    return report


def try_neutralize(gate: nn.Module) -> bool:
    """Make ``gate`` the identity; return False if it cannot be."""
    if not isinstance(gate, Attention):
        return False
    try:
        gate.neutralize()
    except AttachError:
        return False
    return True


def rename(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``model``: without wrappers' prefixes, and with ``eca`` for timm's ``se``."""
    own = model.state_dict().keys()
    return {find_name(key, own): value for key, value in state.items()}


def find_name(key: str, own: Collection[str]) -> str:
    """Return the name among ``own`` that ``key`` means, or ``key`` without wrappers' prefixes if there is none."""
    while key not in own:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            ours = key.replace(".se.conv.", ".eca.conv.")
            return ours if ours in own else key
        key = key.removeprefix(prefix)
    return key


def resize_kernels(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Give each ECA gate the kernel size of its tensor in ``state``; return the new size of those that changed."""
    resized: dict[str, int] = {}
    for name, gate in find_gates(model).items():
        weight = state.get(f"{name}.conv.weight")
        if not isinstance(gate, ECA | ECANS) or weight is None or weight.dim() != 3:
            continue
        old, k = gate.conv, weight.shape[-1]
        if k == gate.kernel_size or k % 2 == 0 or weight.shape[:2] != old.weight.shape[:2]:
            continue
        new = nn.Conv1d(old.in_channels, old.out_channels, k, padding=k // 2, groups=old.groups, bias=False)
        gate.conv = new.to(old.weight)
        resized[name] = k
    return resized


def find_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of ``model`` by name.

    They are this library's, those that `ecanet.attach` put in, and those in the slot of a block, whatever their class.
    """
    modules = dict(list_modules(model))
    slots = {f"{name}.{key}" for name, module in modules.items() if (key := vars(module).get("gate_key"))}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, Attention)
        or hasattr(module, "attachment")
        or (name in slots and not isinstance(module, nn.Identity))
    }


def list_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of ``model``, itself first; PyTorch's annotation says less."""
    return list(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Return the prefix of the classifier's tensors: the last linear layer outside the gates; empty without one."""
    inside = tuple(name + "." for name in find_gates(model))
    linear = [name for name, m in list_modules(model) if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return (linear[-1] + ".",) if linear else ()
