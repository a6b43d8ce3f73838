"""Read other people's checkpoints: the authors', timm's, torchvision's, Lightning's, plain ones."""

import pickle
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ecanet.attention import ECA, ECANS, Attention
from ecanet.errors import CheckpointError

PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "backbone.")
"""What DataParallel, torch.compile, Lightning and others put before every name."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which a checkpoint keeps its state dict."""


@dataclass
class LoadReport:
    """What a checkpoint gave to a network; prints as a few lines."""

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """In the network, not in the file: left as it was."""
    unexpected: list[str] = field(default_factory=list)
    """In the file, not in the network: left over."""
    mismatched: list[str] = field(default_factory=list)
    """In both with different shapes: left as it was."""
    resized: dict[str, int] = field(default_factory=dict)
    """Gates whose kernel size was taken from the file's tensor."""
    neutral: list[str] = field(default_factory=list)
    """Gates that the file has not, made neutral: they change nothing until trained."""
    acting: list[str] = field(default_factory=list)
    """Gates without parameters: nothing makes them neutral, so a plain network's file gives other outputs."""
    head: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether file and network agree in every name and shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def require_backbone(self) -> None:
        """Raise CheckpointError if anything beside the classifier and the gates was not found or does not fit."""
        gates = tuple(name + "." for name in self.neutral)
        lost = [n for n in self.missing + self.mismatched if not n.startswith(self.head + gates)]
        if lost:
            raise CheckpointError(
                f"{self.source} does not fit this network: {len(lost)} tensors are missing or of another shape, "
                f"first {lost[0]!r}; check the model's name, attention and in_channels"
            )

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors matched"]
        for what in ("missing", "unexpected", "mismatched", "neutral", "acting"):
            names = getattr(self, what)
            if names:
                lines.append(f"  {what}: {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        if self.resized:
            sizes = ", ".join(f"{name} k={k}" for name, k in list(self.resized.items())[:3])
            lines.append(f"  kernel sizes taken from the file: {len(self.resized)} ({sizes}…)")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Load the state dict in ``path`` into ``model`` and say what matched, what was missing, what was left over.

    Reads the authors' files (DataParallel's ``module.``, a ``state_dict`` inside), timm's (``se.conv.weight`` for
    ECA), Lightning's and plain ones. ECA kernel sizes are taken from the file's tensors; other metadata (an ``arch``
    tag) is ignored. Gates absent from the file are made neutral, so an old plain checkpoint gives its old outputs.
    Tensors of another shape (a head for other classes) are reported and left as they were.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, would run code, or shares no name.
    """
    return load_state_dict(model, read_state_dict(path), source=str(path))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in the file ``path``, names as stored; never runs code from the file.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    content = read_file(path)
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise CheckpointError(f"{path} holds no state dict (a dictionary of names and tensors)")
    return state


def read_file(path: str | Path) -> object:
    """What `torch.load` finds in ``path``, weights only.

    Raises:
        CheckpointError: see `load_checkpoint`.
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
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 120 characters, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def load_state_dict(model: nn.Module, state: dict[str, Tensor], *, source: str = "state dict") -> LoadReport:
    """Load ``state`` into ``model`` under the rules of `load_checkpoint`.

    Raises:
        CheckpointError: no name of ``state`` fits the network.
    """
    state = renamed(state, model)
    if not state.keys() & model.state_dict().keys():
        first = next(iter(state), "none")
        raise CheckpointError(f"{source} shares no tensor name with this network (its first is {first!r})")
    report = LoadReport(source, head=head_names(model))
    report.resized = resize_kernels(model, state)
    for name, gate in gates_of(model).items():
        if not any(True for _ in gate.parameters()):
            report.acting.append(name)
        elif not any(key.startswith(name + ".") for key in state):
            gate.neutralize()
            report.neutral.append(name)
    own = model.state_dict()
    report.mismatched = [k for k in state if k in own and own[k].shape != state[k].shape]
    fitting = {k: v for k, v in state.items() if k not in report.mismatched}
    result = model.load_state_dict(fitting, strict=False)
    report.unexpected = list(result.unexpected_keys)
    report.missing = [k for k in result.missing_keys if k not in report.mismatched]
    report.matched = [k for k in fitting if k not in report.unexpected]
    return report


def renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` under ``model``'s names: wrappers' prefixes off, timm's name for an ECA gate turned into ours."""
    own = model.state_dict().keys()
    return {own_name(key, own): value for key, value in state.items()}


def own_name(key: str, own: Collection[str]) -> str:
    """The name among ``own`` that ``key`` means, or ``key`` without wrappers' prefixes if there is none."""
    while key not in own:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            ours = key.replace(".se.conv.", ".eca.conv.")
            return ours if ours in own else key
        key = key.removeprefix(prefix)
    return key


def resize_kernels(model: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """Give each ECA gate the kernel size of its tensor in ``state``; returns the new size of those that changed."""
    resized = {}
    for name, gate in gates_of(model).items():
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


def gates_of(model: nn.Module) -> dict[str, Attention]:
    """The attention modules of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefix of the classifier's tensors: the last linear layer outside the gates; empty if there is none."""
    inside = tuple(name + "." for name in gates_of(model))
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return (linear[-1] + ".",) if linear else ()
