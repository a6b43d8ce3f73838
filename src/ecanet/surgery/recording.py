"""Run a model once and record what happened: which tensor came from which, and which module returned it.

A `Value` is the content of a tensor at one moment (an in-place operation gives the tensor a new value). A `Call` is one
run of a module's forward. Only values that depend on the input are recorded; parameters and constants are not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

CONVOLUTIONS = frozenset(
    ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"]
)
NORMS = frozenset(["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"])
ADDITIONS = frozenset(["add", "add_", "__add__", "__iadd__", "__radd__"])
PRODUCTS = frozenset(
    ["mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply", "div", "div_", "__truediv__", "__itruediv__"]
)
LAST_AXIS = frozenset(["linear", "layer_norm", "rms_norm"])
"""Operations whose channels are the last axis."""
RESHAPES = frozenset(["reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"])


class Handle(Protocol):
    """A hook's handle."""

    def remove(self) -> None:
        """Remove the hook."""


@dataclass(eq=False, slots=True)
class Value:
    """The content of a tensor at one moment."""

    index: int
    """Position in `Trace.values`, in the order in which values were made."""
    op: str
    """Name of the operation that made it; "input" for the model's inputs, "module" for code that cannot be seen."""
    parents: tuple["Value", ...]
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    axis: int
    """The axis of the channels, as far as the operations show it."""


@dataclass(eq=False, slots=True)
class Call:
    """One run of a module; ``start`` to ``end`` are the indices of the values made in it."""

    module: nn.Module
    parent: "Call | None"
    depth: int
    start: int
    inputs: list[Value]
    output: Value | None = None
    end: int = -1

    def is_inside(self, other: "Call") -> bool:
        """Return whether this call happened within ``other``, or is it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


@dataclass(eq=False, slots=True)
class Addition:
    """``out = a + b`` in ``call``, where both operands depend on the input."""

    out: Value
    a: Value
    b: Value
    call: Call


@dataclass(eq=False)
class Trace:
    """All calls, additions and values of one run, each in order."""

    calls: list[Call] = field(default_factory=list[Call])
    additions: list[Addition] = field(default_factory=list[Addition])
    values: list[Value] = field(default_factory=list[Value])
    arguments: tuple[tuple[object, ...], dict[str, object]] = ((), {})
    """The example: positional and keyword arguments of the model."""
    output: object = None
    """The model's output."""

    def find_makers(self) -> dict[Value, list[Call]]:
        """Return the calls that made each value; a call that returns its own input (dropout, identity) made nothing."""
        makers: dict[Value, list[Call]] = {}
        for call in self.calls:
            if call.output is not None and call.output not in call.inputs:
                makers.setdefault(call.output, []).append(call)
        return makers


class Recorder(TorchFunctionMode):
    """While active, record into ``trace`` every operation on tensors that descend from the followed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        # The dictionary compares tensors by identity, and does not keep them alive.
        self._value_of = cast("dict[Tensor, Value]", WeakIdKeyDictionary())
        self._stack: list[Call] = []
        self._handles: list[Handle] = []

    def __enter__(self) -> "Recorder":
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # pyright: ignore[reportUnknownMemberType]
        for handle in self._handles:
            handle.remove()

    def follow(self, tensor: Tensor) -> None:
        """Record ``tensor`` as an input of the model."""
        self._record(tensor, "input", ())

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run ``func``, and record its result and every tensor that it changed in place."""
        kwargs = kwargs or {}
        name = func.__name__
        tensors = list(iterate_tensors((args, kwargs)))
        known = {id(t): value for t in tensors if (value := self._value_of.get(t)) is not None}
        versions = [read_version(t) for t in tensors]
        result = func(*args, **kwargs)
        parents = tuple(dict.fromkeys(known.values()))
        if not parents or (name.endswith("__get__") and not isinstance(result, Tensor)):
            return result
        changed = [t for t, before in zip(tensors, versions, strict=True) if read_version(t) != before]
        for t in changed:
            self._record(t, name, parents, args, kwargs)
        arguments = {id(t) for t in tensors}
        for t in iterate_tensors(result):
            if id(t) not in arguments:
                self._record(t, name, parents, args, kwargs)
        if name in ADDITIONS and isinstance(result, Tensor):
            self._note_addition(result, [known.get(id(t)) for t in tensors])
        return result

    def _note_addition(self, result: Tensor, operands: list[Value | None]) -> None:
        if len(operands) != 2 or not self._stack:
            return
        a, b = operands
        if a is not None and b is not None and a is not b and a.shape == b.shape and len(a.shape) >= 3:
            self.trace.additions.append(Addition(self._value_of[result], a, b, self._stack[-1]))

    def _record(
        self,
        tensor: Tensor,
        op: str,
        parents: tuple[Value, ...],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> None:
        shape = tensor.shape
        axis = find_channel_axis(op, shape, parents, args, kwargs or {})
        value = Value(len(self.trace.values), op, parents, shape, tensor.device, tensor.dtype, axis)
        self.trace.values.append(value)
        self._value_of[tensor] = value

    def _enter_module(self, module: nn.Module, args: object) -> None:
        inputs = [value for t in iterate_tensors(args) if (value := self._value_of.get(t)) is not None]
        parent = self._stack[-1] if self._stack else None
        call = Call(module, parent, len(self._stack), len(self.trace.values), inputs)
        self.trace.calls.append(call)
        self._stack.append(call)

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        # A call that ended in an exception, which the model caught, never left the stack.
        while self._stack and self._stack[-1].module is not module:
            self._stack.pop()
        call = self._stack.pop()
        for t in iterate_tensors(output):
            # Code that this mode cannot see into, such as a custom kernel, made the tensor.
            if t not in self._value_of and call.inputs:
                self._record(t, "module", tuple(dict.fromkeys(call.inputs)))
        call.end = len(self.trace.values)
        if isinstance(output, Tensor):
            call.output = self._value_of.get(output)


def iterate_tensors(content: object) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dictionaries (so of Hugging Face's outputs too), in order."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for item in cast("dict[object, object]", content).values():
            yield from iterate_tensors(item)
    elif isinstance(content, tuple | list):
        for item in cast("Sequence[object]", content):
            yield from iterate_tensors(item)


def read_version(tensor: Tensor) -> int:
    """Return a count that grows with each in-place change of ``tensor``; inference tensors keep none: -1."""
    return -1 if tensor.is_inference() else tensor._version


def find_channel_axis(
    op: str, shape: torch.Size, parents: tuple[Value, ...], args: Sequence[object], kwargs: Mapping[str, object]
) -> int:
    """Return the axis of the channels in the result of ``op``, derived from those of its operands; 1 if unknown."""
    if op in LAST_AXIS:
        return len(shape) - 1
    if not parents or op in CONVOLUTIONS or op in NORMS:
        return 1
    parent = max(parents, key=lambda v: (len(v.shape) == len(shape), v.shape.numel()))
    if op == "permute":
        dims: object = kwargs.get("dims") or (args[1:] if isinstance(args[1], int) else args[1])
        return [d % len(shape) for d in cast("Sequence[int]", dims)].index(parent.axis)
    if op in ("transpose", "transpose_", "swapaxes"):
        axes = cast("Sequence[int]", (*args[1:], *kwargs.values()))
        first, second = (d % len(shape) for d in axes[:2])
        return {first: second, second: first}.get(parent.axis, parent.axis)
    if op in RESHAPES:
        return find_axis_after_reshape(parent, shape)
    return parent.axis if len(parent.shape) == len(shape) else min(parent.axis, max(len(shape) - 1, 0))


def find_axis_after_reshape(parent: Value, shape: torch.Size) -> int:
    """Return the axis of ``shape`` with as many channels, and as many elements before it, as in ``parent``; else 1."""
    channels, before = parent.shape[parent.axis], math.prod(parent.shape[: parent.axis])
    kept = [i for i in range(len(shape)) if shape[i] == channels and math.prod(shape[:i]) == before]
    return kept[-1] if kept else 1
