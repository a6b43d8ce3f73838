"""Run a model so that nothing of the run remains in it.

A forward may change more than its result: running statistics, counters, caches, lists of outputs, random states,
sometimes its own parameters. `preserve_state` puts all of that back. Copies of all parameters would cost more than the
run, so in evaluation a parameter is copied right before it is written to.
"""

import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecanet.errors import AttachError

Container = dict[object, object] | list[object] | set[object] | deque[object]

NOTHING: Container = []

KEPT = (dict, list, set, deque, tuple, Tensor)
"""Kinds of attributes whose content is saved too."""


@contextmanager
def preserve_state(
    model: nn.Module, *, training: bool = False, recorder: AbstractContextManager[object] | None = None
) -> Generator[None]:
    """Run the body with all modules in evaluation (or training) mode; restore the whole state of ``model`` afterwards.

    The state is: training flags, parameters with their gradients and ``requires_grad``, buffers, everything else that
    modules keep in their attributes (also inside of dictionaries, lists and sets), and the random states of Python,
    NumPy and PyTorch on the model's devices. ``recorder`` is a context that surrounds the body; it does not see what is
    done here.

    Raises:
        AttachError: in evaluation, the body changed a parameter through another tensor that shares its memory.
    """
    containers, tensors = collect_contents(model)
    saved = {id(tensor): SavedTensor(tensor) for tensor in tensors}
    for tensor in tensors:
        if training or not isinstance(tensor, nn.Parameter):
            saved[id(tensor)].copy()
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        for module in model.modules():
            module.training = training
        with preserve_random_states(tensors), recorder or nullcontext(), CopyBeforeWrite(saved):
            yield
    finally:
        for container, before in containers:
            restore_container(container, before)
        changed = [names.get(id(one.tensor), "") for one in saved.values() if not one.restore()]
        for parameter, gradient, requires_grad in parameters:
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        if changed:
            raise AttachError(
                f"running {type(model).__name__} changes its parameter {changed[0]!r} in a way that cannot be undone; "
                f"switch that off before attaching"
            )


def collect_contents(model: nn.Module) -> tuple[list[tuple[Container, Container]], list[Tensor]]:
    """Return every container that a module of ``model`` holds, with a copy, and every tensor in them, each once.

    The attributes of a module are such a container, and so are its dictionaries of parameters, buffers and hooks.
    """
    containers: list[tuple[Container, Container]] = []
    tensors: list[Tensor] = []
    seen: set[int] = set()
    queue: list[object] = [vars(module) for module in model.modules()]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            # Tensors without memory of their own kind (meta, sparse, nested, subclasses) cannot be compared.
            plain = type(item) in (Tensor, nn.Parameter) and item.layout == torch.strided
            if plain and not item.is_meta and not item.is_nested:
                tensors.append(item)
        elif isinstance(item, dict):
            some = cast("dict[object, object]", item)
            if not some:  # most are, such as those of hooks
                containers.append((some, NOTHING))
                continue
            containers.append((some, dict(some)))
            queue += [value for value in some.values() if isinstance(value, KEPT)]
        else:
            content = list(cast("Iterable[object]", item))
            if not isinstance(item, tuple):
                containers.append((cast("Container", item), content))
            queue += [value for value in content if isinstance(value, KEPT)]
    return containers, tensors


def restore_container(container: Container, before: Container) -> None:
    """Give ``container`` the entries of ``before`` again, in their order; leave it alone if nothing changed."""
    if not before:
        if container:
            container.clear()
    elif isinstance(container, dict):
        assert isinstance(before, dict)
        if not (hold_same(container, before) and hold_same(container.values(), before.values())):
            container.clear()
            for key, value in before.items():  # Counter.update would add
                container[key] = value
    elif not hold_same(container, before):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def hold_same(a: Collection[object], b: Collection[object]) -> bool:
    """Return whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


class SavedTensor:
    """A tensor with its memory, and with a copy of its content once there is one."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        # The same memory, because ``tensor.data = ...`` may give the tensor another one.
        self.memory = tensor.detach()
        self.content: Tensor | None = None
        self.version = None if tensor.is_inference() else tensor._version

    def copy(self) -> None:
        """Copy the content, if that was not done before."""
        if self.content is None:
            self.content = self.memory.clone()

    def restore(self) -> bool:
        """Give the tensor its memory and content again; return False if it changed and there is no copy."""
        tensor, memory = self.tensor, self.memory
        if (tensor.data_ptr(), tensor.shape, tensor.dtype) != (memory.data_ptr(), memory.shape, memory.dtype):
            tensor.data = memory
        if self.content is None:
            return tensor.is_inference() or tensor._version == self.version
        if not are_equal(tensor.detach(), self.content):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the first alone enables gradients
                tensor.copy_(self.content)
        return True


class CopyBeforeWrite(TorchFunctionMode):
    """While active, copy each parameter among ``saved`` before a function writes to it, or asks for its ``data``."""

    def __init__(self, saved: dict[int, SavedTensor]):
        super().__init__()
        self.saved = saved

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run ``func``."""
        one = self.saved.get(id(args[0])) if args else None
        if one is not None:
            name = getattr(func, "__name__", "")
            reads_data = name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data"
            in_place = name.endswith("_") and not name.endswith("__")
            if reads_data or in_place or name.startswith("__i") or name == "__setitem__":
                one.copy()
        return func(*args, **kwargs or {})


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal; not-a-number equals itself."""
    if torch.equal(a, b):
        return True
    numbers = a.is_floating_point() or a.is_complex()
    return numbers and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


@contextmanager
def preserve_random_states(tensors: Iterable[Tensor]) -> Generator[None]:
    """Restore the random states of Python, of NumPy, and of PyTorch on the CPU and on the devices of ``tensors``."""
    # NumPy is no dependency: a model that has not imported it cannot draw from it.
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "mps", "xpu")}
    fork = cast("Callable[..., AbstractContextManager[None]]", torch.random.fork_rng)  # pyright: ignore[reportUnknownMemberType]
    try:
        with ExitStack() as stack:
            stack.enter_context(fork(devices=[]))
            for device in devices:
                stack.enter_context(fork(devices=[device], device_type=device.type))
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
