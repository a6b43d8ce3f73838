"""Load other people's checkpoints: the authors', timm's, torchvision's, Lightning's, plain ones."""

import copy
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ecanet.attention import ECA, ECANS, Attention
from ecanet.errors import AttachError, CheckpointError, summarize
from ecanet.models import matching
from ecanet.models.files import read_file
from ecanet.models.matching import Match, find_problem, match, shorten


@dataclass
class LoadReport:
    """The tensors of a checkpoint that a network took, and the rest; prints as a few lines."""

    source: str
    entry: str = ""
    """The dictionary inside the file that was used and the prefix of its names; empty if there is neither."""
    others: tuple[str, ...] = ()
    """Other dictionaries and prefixes that would fit too, such as the raw weights beside the averaged ones."""
    matched: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    """Tensors of the network that the file does not have; they are left as they were."""
    unexpected: list[str] = field(default_factory=list[str])
    """Tensors of the file that the network does not have, under the file's names; they are ignored."""
    mismatched: list[str] = field(default_factory=list[str])
    """Tensors that have another shape in the file; they are left as they were."""
    not_finite: list[str] = field(default_factory=list[str])
    """Tensors that were loaded and hold NaN or infinity: the network's outputs will mean nothing."""
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
        if self.entry:
            lines.append(f"  taken from {shorten(self.entry)}")
        groups = {
            "also in the file, not used": self.others,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "not finite (NaN or infinity)": self.not_finite,
            "neutral": self.neutral,
            "acting": self.acting,
        }
        for title, names in groups.items():
            if names:
                first = ", ".join(map(shorten, names[:3]))
                lines.append(f"  {title}: {len(names)} ({first}{', …' if len(names) > 3 else ''})")
        if self.resized:
            sizes = ", ".join(f"{shorten(name)} k={k}" for name, k in list(self.resized.items())[:3])
            more = ", …" if len(self.resized) > 3 else ""
            lines.append(f"  kernel sizes taken from the file: {len(self.resized)} ({sizes}{more})")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, checkpoint: str | Path | Mapping[str, object]) -> LoadReport:
    """Load ``checkpoint``, a path or a state dict, into ``model``; return a report of what matched.

    The state dict may be inside other dictionaries, and its names may have prefixes: the entry and the prefix that fit
    the network best are taken, and of two that fit equally the one with averaged (EMA) weights. ECA kernel sizes are
    taken from the file's tensors, and timm's ``se.conv.weight`` is ECA's. Gates absent from the file are made neutral,
    so an old plain checkpoint gives its old outputs. Tensors of another shape (a head for other classes) are reported
    and left as they were. If an error is raised, the network is as it was before.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint or would run code; nothing in it fits the
            network; or a tensor of the network's has no plain values in it (sparse, quantized, a list).
    """
    if isinstance(checkpoint, str | Path):
        return load_state_dict(model, read_file(checkpoint), source=str(checkpoint))
    return load_state_dict(model, checkpoint)


def load_state_dict(model: nn.Module, content: object, *, source: str = "the state dict") -> LoadReport:
    """Load ``content``, a state dict or dictionaries around it, into ``model`` under the rules of `load_checkpoint`.

    Raises:
        CheckpointError: See `load_checkpoint`. The message calls the content ``source``.
    """
    own, gates = dict(list_tensors(model)), find_gates(model)
    if any(value.is_meta for value in own.values()):
        raise CheckpointError(
            "this network is on the meta device and holds no values; give it memory first: model.to_empty(device='cpu')"
        )
    shapes = {**list_gains(gates), **{name: value.shape for name, value in own.items()}}
    found = match(content, shapes, source)
    state = read_tensors(found, source)
    sizes = find_kernel_sizes(gates, state)
    resized = {join(name, "conv.weight") for name in sizes}
    mismatched = [name for name in state if state[name].shape != shapes[name] and name not in resized]
    if len(mismatched) == len(state):
        raise CheckpointError(
            f"{source} has no tensor that fits this network: all {len(state)} with its names have other shapes, first "
            f"{mismatched[0]!r} {tuple(state[mismatched[0]].shape)} instead of {tuple(shapes[mismatched[0]])}"
        )
    ignored = set(mismatched)
    fitting = {name: value for name, value in state.items() if name not in ignored}
    check_values(fitting, own, source)
    report = LoadReport(source, found.entry, found.others, mismatched=mismatched, resized=sizes, head=find_head(model))
    present = {"", *(name[:end] for name in state for end in range(len(name)) if name[end] == ".")}
    try:
        with undo_on_error(model, gates):
            resize_kernels(gates, sizes)
            for name, gate in gates.items():
                if name not in present:
                    (report.neutral if try_neutralize(gate) else report.acting).append(name)
            absent, _ = cast("tuple[list[str], list[str]]", model.load_state_dict(fitting, strict=False))
    except Exception as error:
        raise CheckpointError(
            f"{source} was not loaded, and the network is as it was before: {summarize(error)}"
        ) from error
    report.missing = [name for name in absent if name not in state]
    report.matched = list(fitting)
    report.unexpected = [n for n, v in found.values.items() if isinstance(v, Tensor) and n not in found.names]
    loaded = dict(list_tensors(model))
    report.not_finite = [name for name in fitting if name in loaded and not is_finite(loaded[name])]
    return report


def read_tensors(found: Match, source: str) -> dict[str, Tensor]:
    """Return the tensors of the entry under the network's names.

    Raises:
        CheckpointError: something else than a tensor has the name of one.
    """
    state: dict[str, Tensor] = {}
    for name, own in found.names.items():
        value = found.values[name]
        if not isinstance(value, Tensor) or value.is_nested:
            kind = "a nested tensor" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{source}: {shorten(name)!r} is {kind} and not a plain tensor; save it as one")
        state[own] = value
    return state


def check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Check that the tensors in ``state`` can be copied into the network's, which have the same names.

    Raises:
        CheckpointError: one cannot; the message names it.
    """
    for name, value in state.items():
        problem = find_problem(value, own.get(name, torch.empty(())))
        if problem is not None:
            raise CheckpointError(f"{source}: {shorten(name)!r} {problem}")


def list_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors in the state dict of ``model`` with their names.

    Raises:
        CheckpointError: some have no shape yet.
    """
    state = cast("dict[str, object]", model.state_dict())
    tensors = [(name, value) for name, value in state.items() if isinstance(value, Tensor)]
    if any(is_lazy(value) for _, value in tensors):
        raise CheckpointError("this network has lazy layers without shapes; run it once on an image, then load")
    return tensors


def list_gains(gates: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Return the names and shapes of the gates' gains, which files hold when they are not 1."""
    return {join(name, "gain"): torch.Size() for name, gate in gates.items() if hasattr(gate, "gain")}


def join(module: str, name: str) -> str:
    """Return the name in the state dict of a module's tensor; the network itself is called "" by PyTorch."""
    return f"{module}.{name}" if module else name


def is_finite(value: Tensor) -> bool:
    """Return whether all elements are finite; integers are."""
    if not value.is_floating_point() and not value.is_complex():
        return True
    return bool(torch.isfinite(value.float() if value.dtype.itemsize == 1 else value).all())


@contextmanager
def undo_on_error(model: nn.Module, gates: Mapping[str, nn.Module]) -> Generator[None]:
    """Give ``model`` its tensors back, and its gates their kernels and gains, if the body raises."""
    values = {name: value.detach().clone() for name, value in list_tensors(model)}
    insides = [(vars(gate), {key: copy_container(item) for key, item in vars(gate).items()}) for gate in gates.values()]
    try:
        yield
    except BaseException:
        for attributes, before in insides:
            attributes.clear()
            attributes.update(before)
        with torch.no_grad():
            for name, value in list_tensors(model):
                value.copy_(values[name])
        raise


def copy_container(item: object) -> object:
    """Return a copy of a dictionary or set, in which a module keeps its tensors and parts; anything else unchanged."""
    return copy.copy(item) if type(item) in (dict, OrderedDict, set) else item


def rename(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``model``; names that the network does not have are kept.

    Raises:
        CheckpointError: no name is the network's.
    """
    return matching.rename(state, {name: value.shape for name, value in list_tensors(model)})


def try_neutralize(gate: nn.Module) -> bool:
    """Make ``gate`` the identity; return False if it cannot be."""
    if not isinstance(gate, Attention):
        return False
    try:
        gate.neutralize()
    except AttachError:
        return False
    return True


def find_kernel_sizes(gates: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the kernel size in ``state`` of each ECA gate whose own size is another one.

    A kernel that reaches past all channels has useless weights, so longer ones are no kernels of this gate.
    """
    sizes: dict[str, int] = {}
    for name, gate in gates.items():
        weight = state.get(join(name, "conv.weight"))
        if not isinstance(gate, ECA | ECANS) or weight is None or weight.dim() != 3:
            continue
        k = weight.shape[-1]
        longest = 2 * gate.channels + 1
        if k != gate.kernel_size and k % 2 and k <= longest and weight.shape[:2] == gate.conv.weight.shape[:2]:
            sizes[name] = k
    return sizes


def resize_kernels(gates: Mapping[str, nn.Module], sizes: Mapping[str, int]) -> None:
    """Give the ECA gates in ``sizes`` kernels of these sizes."""
    for name, k in sizes.items():
        gate = cast("ECA | ECANS", gates[name])
        old = gate.conv
        bias = old.bias is not None
        new = nn.Conv1d(old.in_channels, old.out_channels, k, padding=k // 2, groups=old.groups, bias=bias)
        gate.conv = new.to(old.weight)


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
