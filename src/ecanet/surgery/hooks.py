"""Apply a gate in a block that was written without it: a hook on the target, and a guard on the block.

The gate is a child of the block, so it has a name, moves, trains, saves and copies with it. A forward hook on the
target applies it. Some tools replace a module and lose its hooks (`convert_sync_batchnorm`). The guard, a pre-hook on
the block, installs the hook again, or raises where it cannot (while compiling).
"""

from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError
from ecanet.surgery.modules import Hook, forward_hooks, forward_pre_hooks, is_compiled, list_modules, own_tensors

Mode = Literal["hook", "append", "replace"]
"""The way in which a gate acts: applied by a hook, as the last entry of a Sequential, or in the place of a module."""


class GateHook:
    """Forward hook that passes a module's output, with its channels on ``axis``, through ``gate``."""

    def __init__(self, gate: nn.Module, axis: int):
        self.gate = gate
        self.axis = axis

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        """Return the scaled output, which PyTorch passes on instead of ``output``."""
        scaled: Tensor = self.gate(output if self.axis == 1 else output.movedim(self.axis, 1))
        # A view makes a later in-place addition slower, so there is none for channels on axis 1.
        if self.axis != 1:
            scaled = scaled.movedim(1, self.axis)
        if torch.compiler.is_compiling():
            return scaled
        if scaled.stride() != output.stride():
            scaled = torch.empty_like(output).copy_(scaled)
        if scaled.requires_grad and output.requires_grad:
            keep_layout(output, scaled)
        return scaled


def keep_layout(x: Tensor, y: Tensor) -> None:
    """Give the gradient of ``x`` the memory layout of the gradient of ``y``, as if there were no gate between them.

    Layers before may sum the gradient in memory order. With the same layout, their parameters' gradients are equal to
    the plain network's in the last bit.
    """
    strides: list[tuple[int, ...]] = []

    def note(gradient: Tensor) -> None:
        strides.append(gradient.stride())

    def restore(gradient: Tensor) -> Tensor | None:
        if not strides or gradient.stride() == strides[-1] or 0 in strides[-1]:
            return None
        return torch.empty_strided(gradient.shape, strides[-1], dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )

    for tensor, hook in ((y, note), (x, restore)):
        tensor.register_hook(hook)  # pyright: ignore[reportUnknownMemberType]


class Guard:
    """Forward pre-hook of the block that checks that the target still has its hook."""

    def __init__(self, target: str, key: str, hook: GateHook):
        self.target = target
        self.key = key
        self.hook = hook

    def __call__(self, module: nn.Module, args: object) -> None:
        """Install the hook again if it is gone.

        Raises:
            AttachError: it is gone, and the model is being compiled.
        """
        hooks = forward_hooks(module.get_submodule(self.target))
        if self.key not in hooks:
            if torch.compiler.is_compiling():
                raise AttachError(f"{self.target!r} was replaced after attach: run the model once before compiling it")
            hooks[self.key] = self.hook


class Record:
    """The changes that `attach` made for one gate; kept on the gate as ``gate.attachment``, and copied with it."""

    def __init__(self, attention: str, target: str, mode: Mode, *, lossless: bool, channels: int):
        self.attention = attention
        """Name of the attention, or of the user's class."""
        self.channels = channels
        self.shape: tuple[int, ...] = ()
        """Spatial shape of the example at this place."""
        self.target = target
        """Name of the module on whose output the gate acts, relative to the block that keeps the gate."""
        self.mode: Mode = mode
        self.lossless = lossless
        self.affine: str | None = None
        """Name, relative to the block, of the norm or convolution right before the gate."""
        self.doubled = False
        """Whether `fold` doubled that norm or convolution."""
        self.replaced: nn.Module | None = None
        """The module whose place the gate took; not a child, so not in the state dict."""


def keep_record(gate: nn.Module, record: Record) -> None:
    """Store ``record`` on ``gate`` as a plain attribute: it is copied and pickled, and no part of the state dict."""
    vars(gate)["attachment"] = record


def is_folded(gate: nn.Module, record: Record) -> bool:
    """Return whether the layer before ``gate`` is doubled now: `fold` did it, and no file with a gain was loaded."""
    return record.doubled and cast(float, gate.gain) == 1


def install(block: nn.Module, key: str, target: str, gate: nn.Module, axis: int) -> None:
    """Make ``gate`` the child ``key`` of ``block`` and apply it to the output of ``block``'s submodule ``target``.

    The hooks have names for keys, unlike those of PyTorch's handles. Handles are numbered from 0 in every process, so
    in an unpickled model a new handle could replace a gate's hook.
    """
    hook, name = GateHook(gate, axis), name_hook(key, target)
    block.add_module(key, gate)
    forward_hooks(block.get_submodule(target))[name] = hook
    forward_pre_hooks(block)[name] = Guard(target, name, hook)


def uninstall(block: nn.Module, key: str, target: str) -> None:
    """Remove a gate and its hooks: the inverse of `install`."""
    delattr(block, key)
    forward_hooks(block.get_submodule(target)).pop(name_hook(key, target), None)
    forward_pre_hooks(block).pop(name_hook(key, target), None)


def name_hook(key: str, target: str) -> str:
    """Return the key under which a target and a block keep the hooks of the gate ``key``."""
    return f"ecanet.{key}@{target}"


def find_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """Yield the name, the module and the record of every attached gate.

    Raises:
        AttachError: a gate lost its target, so it does nothing, or acts without being a part of the model.
    """
    found: set[nn.Module] = set()
    for name, module in list_modules(model):
        record = getattr(module, "attachment", None)
        if isinstance(record, Record):
            found.add(module)
            if not is_reachable(model, name, module, record):
                raise AttachError(
                    f"gate {name!r} is no longer reachable: {record.target!r} was removed or replaced after attach; "
                    f"detach before such changes and attach again afterwards"
                )
            yield name, module, record
    for name, module in list_modules(model):
        for hook in forward_hooks(module).values():
            if isinstance(hook, GateHook) and hook.gate not in found:
                raise AttachError(
                    f"a gate acts after {name!r} but is no part of this model, so it is neither saved nor trained "
                    f"(torch.fx leaves it out); attach to the final model instead"
                )


def is_reachable(model: nn.Module, name: str, gate: nn.Module, record: Record) -> bool:
    """Return whether running the model runs the gate, as far as its modules and hooks show."""
    block = model.get_submodule(name.rpartition(".")[0])
    if record.mode != "hook":
        return True
    key = name_hook(name.rpartition(".")[2], record.target)
    try:
        target = block.get_submodule(record.target)
    except AttributeError:
        return False
    hook: Hook | None = forward_hooks(target).get(key)
    guard: Hook | None = forward_pre_hooks(block).get(key)
    return isinstance(guard, Guard) or (isinstance(hook, GateHook) and hook.gate is gate)


WRAPPERS = {
    "DistributedDataParallel": "attach to its .module before wrapping it, so that gates are synchronised",
    "DataParallel": "its replicas would share one gate; use DistributedDataParallel, and attach before wrapping",
    "FullyShardedDataParallel": "attach before sharding",
    "FSDPModule": "attach before sharding",
    "OptimizedModule": "attach before torch.compile, because a compiled model ignores later hooks",
    "ScriptModule": "attach before torch.jit.trace (torch.jit.script does not support these hooks)",
}
"""Remedies by the name of the wrapper's class, so that the check imports nothing."""


def refuse_wrapped(model: nn.Module) -> None:
    """Check that new gates in ``model`` will run, train and be synchronised.

    Raises:
        AttachError: it is wrapped, compiled or lazy.
    """
    for name, module in list_modules(model):
        what = name or "the model"
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                raise AttachError(f"{what} is wrapped in {kind.__name__}: {WRAPPERS[kind.__name__]}")
        if is_compiled(module):
            raise AttachError(f"{what} is compiled: attach before .compile(), which ignores later hooks")
        if any(isinstance(p, nn.UninitializedParameter) for p in own_tensors(module)):
            raise AttachError(f"{what} is lazy and has no channels yet: run the model once before attaching")
