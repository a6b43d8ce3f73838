"""How a gate acts in a block that does not know it: a hook on the target, and a guard on the block.

The gate is a child of the block, so it has a name, moves, trains, saves and copies with it. A forward hook on the
target applies it. Some tools replace a module and lose its hooks (`convert_sync_batchnorm`): the guard, a pre-hook on
the block, puts ours back, or says so where it cannot (while compiling).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError

Mode = Literal["hook", "append", "replace"]
"""A hook applies the gate, or it is the last entry of a Sequential, or it stands in the place of a module."""


class GateHook:
    """Forward hook: the module's output through ``gate``, whose channels are ``axis``."""

    def __init__(self, gate: nn.Module, axis: int):
        self.gate = gate
        self.axis = axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The hook's result takes the output's place."""
        scaled = self.gate(output if self.axis == 1 else output.movedim(self.axis, 1))
        if self.axis != 1:  # a view, which costs an in-place addition afterwards, so only where it must be
            scaled = scaled.movedim(1, self.axis)
        if torch.compiler.is_compiling():
            return scaled
        if scaled.stride() != output.stride():
            scaled = torch.empty_like(output).copy_(scaled)
        if scaled.requires_grad and output.requires_grad:
            keep_layout(output, scaled)
        return scaled


def keep_layout(x: Tensor, y: Tensor) -> None:
    """Give the gradient of ``x`` the memory layout of that of ``y``, as if nothing stood between them.

    What receives it may sum in memory order: only so are the other parameters' gradients equal in the last bit.
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

    y.register_hook(note)
    x.register_hook(restore)


class Guard:
    """Forward pre-hook of the block: sees that the target still has its hook."""

    def __init__(self, target: str, key: str, hook: GateHook):
        self.target = target
        self.key = key
        self.hook = hook

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look, and put the hook back if it is gone."""
        hooks = named(module.get_submodule(self.target)._forward_hooks)
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
    """Whether what stands before ``gate`` is doubled now: `fold` did it, and no file with a gain was loaded since."""
    return record.doubled and float(gate.gain) == 1  # pyright: ignore[reportArgumentType]


def install(block: nn.Module, key: str, target: str, gate: nn.Module, axis: int) -> None:
    """Make ``gate`` the child ``key`` of ``block`` and apply it to the output of ``block``'s submodule ``target``.

    Hooks are kept under names rather than through handles: handles' numbers start again in a new process, and would
    there collide with those of an unpickled model.
    """
    hook, name = GateHook(gate, axis), hook_key(key, target)
    block.add_module(key, gate)
    named(block.get_submodule(target)._forward_hooks)[name] = hook
    named(block._forward_pre_hooks)[name] = Guard(target, name, hook)


def uninstall(block: nn.Module, key: str, target: str) -> None:
    """The inverse of `install`."""
    delattr(block, key)
    named(block.get_submodule(target)._forward_hooks).pop(hook_key(key, target), None)
    named(block._forward_pre_hooks).pop(hook_key(key, target), None)


def named(hooks: Any) -> dict[str, Any]:
    """A module's dictionary of hooks, for names as keys."""
    return hooks


def hook_key(key: str, target: str) -> str:
    """Under which name a target and a block keep the hooks of the gate ``key``."""
    return f"ecanet.{key}@{target}"


def gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """Name, module and record of every attached gate.

    Raises:
        AttachError: a gate has lost its place, and so does nothing (or acts without being a part of the model).
    """
    found: set[nn.Module] = set()
    for name, module in model.named_modules():
        record = getattr(module, "attachment", None)
        if isinstance(record, Record):
            found.add(module)
            if not reachable(model, name, module, record):
                raise AttachError(
                    f"gate {name!r} is no longer reachable: {record.target!r} was removed or replaced after attach; "
                    f"detach before such changes and attach again afterwards"
                )
            yield name, module, record
    for name, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, GateHook) and hook.gate not in found:
                raise AttachError(
                    f"a gate acts after {name!r} but is no part of this model, so it is neither saved nor trained "
                    f"(torch.fx leaves it out); attach to the final model instead"
                )


def reachable(model: nn.Module, name: str, gate: nn.Module, record: Record) -> bool:
    """Whether running the model runs the gate, as far as the modules tell."""
    block = model.get_submodule(name.rpartition(".")[0])
    if record.mode != "hook":
        return True
    key = hook_key(name.rpartition(".")[2], record.target)
    try:
        target = block.get_submodule(record.target)
    except AttributeError:
        return False
    hook, guard = named(target._forward_hooks).get(key), named(block._forward_pre_hooks).get(key)
    return isinstance(guard, Guard) or (isinstance(hook, GateHook) and hook.gate is gate)


WRAPPERS = {
    "DistributedDataParallel": "attach to its .module before wrapping it, so that gates are synchronised",
    "DataParallel": "its replicas would share one gate; use DistributedDataParallel, and attach before wrapping",
    "FullyShardedDataParallel": "attach before sharding",
    "FSDPModule": "attach before sharding",
    "OptimizedModule": "attach before torch.compile, since a compiled model ignores later hooks",
    "ScriptModule": "attach before torch.jit.trace (torch.jit.script does not know hooks like ours)",
}
"""By class name, so that nothing needs importing."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AttachError for models in which a new gate would be ignored or not synchronised."""
    for name, module in model.named_modules():
        what = name or "the model"
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                raise AttachError(f"{what} is wrapped in {kind.__name__}: {WRAPPERS[kind.__name__]}")
        if module._compiled_call_impl is not None:
            raise AttachError(f"{what} is compiled: attach before .compile(), which ignores later hooks")
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise AttachError(f"{what} is lazy and has no channels yet: run the model once before attaching")
