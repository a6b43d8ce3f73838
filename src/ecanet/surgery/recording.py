"""Run a model once and record what happened: which tensor came from which, and which module returned it.

A `Value` is the content of a tensor at one moment (an in-place operation gives the tensor a new value). A `Call` is one
run of a module's forward. Only values that depend on the input are recorded; parameters and constants are not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ecanet.surgery.modules import read_version

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
RESHAPES = frozenset(["reshape", "view", "flatten", "unflatten", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_"])
_REORDERS = "permute transpose transpose_ swapaxes swapaxes_ swapdims swapdims_ movedim moveaxis t t_ T mT H mH"
REORDERS = frozenset(_REORDERS.split(" "))
"""Operations that only change the order of the axes."""


@dataclass(eq=False, slots=True)
class Value:
    """The content of a tensor at one moment."""

    index: int
    """Position in `Trace.values`, in the order in which values were made."""
    op: str
    """Name of the operation that made it; "input" for the model's inputs, "module" for code that cannot be seen."""
    parents: tuple["Value", ...] = field(repr=False)  # all that led here, over and over
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    axis: int
    """The axis of the channels, as far as the operations show it; 1 if they do not, even in a tensor of fewer axes."""
    weight: torch.Size | None = None
    """Shape of the weight, of a convolution or a linear layer."""

    @property
    def channels(self) -> int:
        """Return the size of the channel axis; 0 in a tensor that does not have that axis."""
        return self.shape[self.axis] if self.axis < len(self.shape) else 0


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
    steps: list[tuple[nn.Module, fx.Node, Value]] = field(default_factory=list[tuple[nn.Module, fx.Node, Value]])
    """The graph, the node and its result, for each node of the graphs in the model that returned a tensor."""
    changing: set[fx.Node] = field(default_factory=set[fx.Node])
    """The nodes that changed an operand in place."""
    arguments: tuple[tuple[object, ...], dict[str, object]] = ((), {})
    """The example: positional and keyword arguments of the model."""
    output: object = None
    """The model's output."""
    returned: set[Value] = field(default_factory=set[Value])
    """The values in the model's output."""
    trained: set[nn.Module] | str | None = None
    """The modules that a run in training mode runs; a failed run's reason; None if both modes run the same modules."""

    def find_makers(self) -> dict[Value, list[Call]]:
        """Return the calls that made each value; a call that returns its own input (dropout, identity) made nothing."""
        makers: dict[Value, list[Call]] = {}
        for call in self.calls:
            if call.output is not None and call.output.index >= call.start:
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
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        super().__enter__()
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)  # pyright: ignore[reportUnknownMemberType]

    def follow(self, tensor: Tensor) -> None:
        """Record ``tensor`` as an input of the model."""
        self._record(tensor, Operation("input"))

    def keep_output(self, output: object) -> None:
        """Record ``output`` as the output of the model."""
        self.trace.output = output
        self.trace.returned = {value for t in iterate_tensors(output) if (value := self._value_of.get(t)) is not None}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run ``func``, and record its result and every tensor that it changed in place."""
        kwargs = kwargs or {}
        tensors = list(iterate_tensors((args, kwargs)))
        known = {id(t): value for t in tensors if (value := self._value_of.get(t)) is not None}
        versions = [read_version(t) for t in tensors]
        result = func(*args, **kwargs)
        name = name_operation(func)
        if not known or (name.endswith("__get__") and not isinstance(result, Tensor)):
            return result
        operation = Operation(name, tuple(dict.fromkeys(known.values())), func, args, kwargs)
        for t, before in zip(tensors, versions, strict=True):
            if read_version(t) != before or (t is result and operation.seems_in_place(counted=before is not None)):
                self._record(t, operation)
        arguments = {id(t) for t in tensors}
        for t in iterate_tensors(result):
            if id(t) not in arguments:
                self._record(t, operation)
        if name in ADDITIONS and isinstance(result, Tensor):
            self._note_addition(result, [known.get(id(t)) for t in tensors])
        return result

    def _note_addition(self, result: Tensor, operands: list[Value | None]) -> None:
        out = self._value_of.get(result)
        numbers = result.is_floating_point() or result.is_complex()  # others are positions and masks
        if len(operands) != 2 or out is None or not numbers or not self._stack:
            return
        a, b = operands
        if a is not None and b is not None and a is not b and a.shape == b.shape and len(a.shape) >= 3:
            self.trace.additions.append(Addition(out, a, b, self._stack[-1]))

    def _record(self, tensor: Tensor, operation: "Operation") -> None:
        # A nested tensor has no shape of plain numbers.
        shape = torch.Size(()) if tensor.is_nested else tensor.shape
        index, axis, weight = len(self.trace.values), operation.find_channel_axis(shape), operation.find_weight()
        value = Value(index, operation.name, operation.parents, shape, tensor.device, tensor.dtype, axis, weight)
        self.trace.values.append(value)
        self._value_of[tensor] = value

    def note_node(self, graph: nn.Module, node: fx.Node, result: object, changes: bool) -> None:
        """Record that ``node`` of ``graph`` returned ``result``, and whether it changed its operands."""
        self.trace.changing.update([node] if changes else [])
        if isinstance(result, Tensor) and (value := self._value_of.get(result)) is not None:
            self.trace.steps.append((graph, node, value))

    def _enter_module(self, module: nn.Module, args: object) -> None:
        inputs = [value for t in iterate_tensors(args) if (value := self._value_of.get(t)) is not None]
        parent = self._stack[-1] if self._stack else None
        call = Call(module, parent, len(self._stack), len(self.trace.values), inputs)
        self.trace.calls.append(call)
        self._stack.append(call)

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        # Calls that ended in an exception, which the model caught, never left the stack. A call that another thread
        # entered may not be there.
        if all(call.module is not module for call in self._stack):
            return
        while (call := self._stack.pop()).module is not module:
            pass
        for t in iterate_tensors(output):
            # Code that this mode cannot see into, such as a custom kernel, made the tensor.
            if t not in self._value_of and call.inputs:
                self._record(t, Operation("module", tuple(dict.fromkeys(call.inputs))))
        call.end = len(self.trace.values)
        if isinstance(output, Tensor):
            call.output = self._value_of.get(output)


@dataclass(eq=False, slots=True)
class Operation:
    """One call of a function on tensors."""

    name: str
    parents: tuple[Value, ...] = ()
    func: Callable[..., object] | None = None
    args: Sequence[object] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict[str, object])

    def seems_in_place(self, *, counted: bool) -> bool:
        """Return whether the function, which returned its argument, is written like one that changed it.

        Where the changes of the argument are ``counted``, only a change of its axes is meant, which does not count.
        """
        name = self.name
        if counted:
            return name.endswith("_") and (name in REORDERS or name in RESHAPES)
        flag = any(value is True for value in (*self.args, *self.kwargs.values()))
        return name.endswith("_") or name.startswith("__i") or flag

    def find_weight(self) -> torch.Size | None:
        """Return the shape of the weight of a convolution or linear layer."""
        weight = self.kwargs.get("weight", self.args[1] if len(self.args) > 1 else None)
        return weight.shape if self.name in CONVOLUTIONS and isinstance(weight, Tensor) else None

    def find_channel_axis(self, shape: torch.Size) -> int:
        """Return the axis of the channels in a result of ``shape``, derived from those of the operands; 1 if unknown.

        A failure here would look like a failure of the model, so arguments that nobody foresaw make the axis unknown.
        """
        try:
            return self._derive_axis(shape)
        except Exception:
            return 1

    def _derive_axis(self, shape: torch.Size) -> int:
        if self.name in LAST_AXIS:
            return len(shape) - 1
        if self.name in CONVOLUTIONS:  # without a batch, channels come first
            return len(shape) - 1 - int(self.name[-2])
        if not self.parents or self.name in NORMS:
            return 1
        parent = max(self.parents, key=lambda v: (len(v.shape) == len(shape), v.shape.numel()))
        if parent.axis >= len(parent.shape):
            return 1
        if self.name in REORDERS:
            return self._follow_axis(parent)
        if self.name in RESHAPES:
            return find_axis_after_reshape(parent, shape)
        return parent.axis if len(parent.shape) == len(shape) else max(min(parent.axis, len(shape) - 1), 1)

    def _follow_axis(self, parent: Value) -> int:
        """Return where the function moves the channels, seen on an empty tensor whose axes differ in size."""
        sizes = tuple(range(2, 2 + len(parent.shape)))
        probe = torch.empty(sizes, device="meta")
        args = [probe if i == 0 else value for i, value in enumerate(self.args)]
        kwargs = {key: probe if key == "input" else value for key, value in self.kwargs.items()}
        assert self.func is not None
        return cast(Tensor, self.func(*args, **kwargs)).shape.index(sizes[parent.axis])


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


def name_operation(func: Callable[..., object]) -> str:
    """Return the name of ``func``: that of the property for ``x.T`` and the like, "add" for ``torch.ops.aten.add``."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in REORDERS else name
    return name.partition(".")[0]


def find_axis_after_reshape(parent: Value, shape: torch.Size) -> int:
    """Return the axis of ``shape`` with as many channels, and as many elements before it, as in ``parent``; else 1."""
    before = math.prod(parent.shape[: parent.axis])
    kept = [i for i in range(len(shape)) if shape[i] == parent.channels and math.prod(shape[:i]) == before]
    return kept[-1] if kept else 1
