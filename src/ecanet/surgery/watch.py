"""Run a model once and write down what happened: which tensor came from which, and which module returned it.

A `Value` is the content of a tensor at one moment (an in-place operation gives the tensor a new value), a `Call` is one
run of a module's forward. Only values that depend on the input are kept; parameters and constants are not.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
RESHAPES = frozenset(["reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"])


@dataclass(eq=False, slots=True)
class Value:
    """What a tensor held at one moment; ``axis`` is the axis of its channels, as far as the operations tell."""

    index: int
    op: str
    parents: tuple["Value", ...]
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    axis: int = 1


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

    def inside(self, other: "Call") -> bool:
        """Whether this call happened within ``other``, or is it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


@dataclass(eq=False, slots=True)
class Addition:
    """``out = a + b``, both of the input's making, seen in ``call``."""

    out: Value
    a: Value
    b: Value
    call: Call


@dataclass(eq=False)
class Trace:
    """Everything one run did, in order."""

    calls: list[Call] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def returned(self) -> dict[Value, list[Call]]:
        """For each value, the calls that made it: those that were given it (dropout, identity) do not count."""
        makers: dict[Value, list[Call]] = {}
        for call in self.calls:
            if call.output is not None and call.output not in call.inputs:
                makers.setdefault(call.output, []).append(call)
        return makers


class Watch(TorchFunctionMode):
    """While active, records into ``trace`` every operation on tensors that descend from the watched ones."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._value_of: Any = WeakIdKeyDictionary()
        self._stack: list[Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "Watch":
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def follow(self, tensor: Tensor) -> None:
        """Call ``tensor`` an input of the model."""
        self._record(tensor, "input", ())

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        tensors = list(tensors_in((args, kwargs)))
        known = {id(t): value for t in tensors if (value := self._value_of.get(t)) is not None}
        versions = [version(t) for t in tensors]
        result = func(*args, **kwargs)
        parents = tuple(dict.fromkeys(known.values()))
        if not parents or (name.endswith("__get__") and not isinstance(result, Tensor)):
            return result
        changed = [t for t, before in zip(tensors, versions, strict=True) if version(t) != before]
        for t in changed:
            self._record(t, name, parents, args, kwargs)
        same = {id(t) for t in tensors}
        for t in tensors_in(result):
            if id(t) not in same:
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

    def _record(self, tensor: Tensor, op: str, parents: tuple[Value, ...], args: Any = (), kwargs: Any = None) -> Value:
        shape = tensor.shape
        axis = channel_axis(op, shape, parents, args, kwargs or {})
        value = Value(len(self.trace.values), op, parents, shape, tensor.device, tensor.dtype, axis)
        self.trace.values.append(value)
        self._value_of[tensor] = value
        return value

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        inputs = [value for t in tensors_in(args) if (value := self._value_of.get(t)) is not None]
        parent = self._stack[-1] if self._stack else None
        call = Call(module, parent, len(self._stack), len(self.trace.values), inputs)
        self.trace.calls.append(call)
        self._stack.append(call)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack[-1].module is not module:  # a call that ended in an exception
            self._stack.pop()
        call = self._stack.pop()
        for t in tensors_in(output):
            if t not in self._value_of and call.inputs:  # made by code that this mode cannot see into
                self._record(t, "module", tuple(dict.fromkeys(call.inputs)))
        call.end = len(self.trace.values)
        if isinstance(output, Tensor):
            call.output = self._value_of.get(output)


def tensors_in(content: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists, dictionaries and dataclasses-like outputs, in order."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for item in content.values():
            yield from tensors_in(item)
    elif isinstance(content, tuple | list):
        for item in content:
            yield from tensors_in(item)


def version(tensor: Tensor) -> int:
    """A count that grows with each in-place change of ``tensor``; inference tensors do not keep one."""
    return -1 if tensor.is_inference() else tensor._version


def channel_axis(op: str, shape: torch.Size, parents: tuple[Value, ...], args: Any, kwargs: dict[str, Any]) -> int:
    """The axis of the channels in the result of ``op``, from what is known of the operands'; 1 if nothing is."""
    if op in LAST_AXIS:
        return len(shape) - 1
    if not parents or op in CONVOLUTIONS or op in NORMS:
        return 1
    parent = max(parents, key=lambda v: (len(v.shape) == len(shape), v.shape.numel()))
    if op == "permute":
        order = kwargs.get("dims") or (args[1] if isinstance(args[1], tuple | list) else args[1:])
        return [d % len(shape) for d in order].index(parent.axis)
    if op in ("transpose", "transpose_", "swapaxes"):
        first, second = (d % len(shape) for d in (*args[1:], *kwargs.values())[:2])
        return {first: second, second: first}.get(parent.axis, parent.axis)
    if op in RESHAPES:
        return _axis_after_reshape(parent, shape)
    return parent.axis if len(parent.shape) == len(shape) else min(parent.axis, max(len(shape) - 1, 0))


def _axis_after_reshape(parent: Value, shape: torch.Size) -> int:
    channels, before = parent.shape[parent.axis], math.prod(parent.shape[: parent.axis])
    kept = [i for i in range(len(shape)) if shape[i] == channels and math.prod(shape[:i]) == before]
    return kept[-1] if kept else 1
