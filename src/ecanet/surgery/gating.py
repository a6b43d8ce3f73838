"""Apply a gate in a block that was written without it: the block's class is exchanged for a subclass of it.

The new class runs the block's own forward with another ``self``, the *inside view* of the block: an object with the
very same attributes, except that a child with a gate comes back as a `GatedCall`. There ``self.bn3(x)`` means
``self.eca(self.bn3(x))``. Everybody else sees the block as it was: ``block.bn3`` is the norm, of its own class and
without hooks. So a gate acts on whatever module stands at its place, whoever put it there (`fuse_modules`,
`convert_sync_batchnorm`, an adapter), and nothing is there that a tool could register a second time. `torch.fx` and
compilers see an ordinary call of the gate.
"""

import sys
from collections.abc import Iterator
from functools import cache, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError
from ecanet.surgery.layout import apply_gate
from ecanet.surgery.modules import children_of, derive_class
from ecanet.surgery.records import Record

RECORDS = "_attached_gates"
"""Attribute of a block: the records of its gates, by the names of the gates."""
VIEW = "_inside_view"
"""Attribute of a block: its inside view, in a tuple, so that nothing takes it for a submodule."""
FORWARD = "_own_forward"
"""Attribute of a block: the function that somebody set as its forward, in the place of its class's; absent mostly."""


class Gated(nn.Module):
    """Mixed into the class of a block that has gates."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a new ``forward`` sees the gates, too.

        Raises:
            AttachError: the new forward does not lead to a method of this block, so that gates would be lost.
        """
        function = find_function(self, value) if name == "forward" else None
        if function is None:
            super().__setattr__(name, value)  # pyright: ignore[reportArgumentType]
        else:
            vars(self)[FORWARD] = function

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; without its ``forward`` the block has its class's again.

        Raises:
            AttachError: a gate stands behind that child.
        """
        if any(record.target == name for record in list_records(self).values()):
            raise AttachError(f"{name!r} of {type(self).__name__} has a gate behind it; ecanet.detach(model) first")
        if name == "forward" and FORWARD in vars(self):
            del vars(self)[FORWARD]
        else:
            super().__delattr__(name)  # pyright: ignore[reportUnknownMemberType]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield names and children, as every module does.

        Raises:
            AttachError: `convert_sync_batchnorm` asks a norm that keeps its own gate. It would move the gate into the
                norm's successor, where nothing calls it.
        """
        keeps_own = any(not record.target for record in list_records(self).values())
        norm = isinstance(self, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
        caller = sys._getframe(1).f_code.co_name  # pyright: ignore[reportPrivateUsage]
        if keeps_own and norm and caller == "convert_sync_batchnorm":
            raise AttachError(
                f"convert_sync_batchnorm would lose the gate that {type(self).__name__} keeps; convert the network "
                f"first, then attach"
            )
        return super().named_children()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Fill a copy or an unpickled block."""
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        view_inside(self)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Describe the block by its original class, which pickle finds by name, and its attributes."""
        original = find_original_class(self)
        if type(self) is not make_gated_class(original):  # a parametrization changed the class again
            return super().__reduce_ex__(protocol)  # pyright: ignore
        return make_empty, (original,), {name: value for name, value in vars(self).items() if name != VIEW}

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which calls this method first.

        Raises:
            AttachError: always.
        """
        # A layer of PyTorch that keeps its own gate is one node of a graph, which cannot be scripted either.
        entered = all(record.target for record in list_records(self).values())
        raise AttachError(
            f"torch.jit.script cannot read the gates attached to {type(self).__name__}; use torch.export.export or "
            f"torch.jit.trace" + (", or script the graph of torch.fx.symbolic_trace" if entered else "")
        )


class Inside(nn.Module):
    """Mixed into the block's class to make the class of its inside view, which shares the block's ``__dict__``."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the original forward of the block, or the function that was set in its place."""
        own = vars(self).get(FORWARD)
        return super(Gated, cast(Gated, self)).forward(*args, **kwargs) if own is None else own(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # nn.Module's own annotation says what its children are
        """Return a child, with its gates. Python calls this for children only: they are not in the ``__dict__``."""
        child: object = super().__getattr__(name)
        gated = any(record.target == name for record in vars(self)[RECORDS].values())
        return GatedCall(self, name, child) if gated else child


class GatedCall:
    """A child as the forward of its block sees it: its call is the child's call, and then the gate's.

    All its attributes, its class among them, are the child's. torch.compile first makes one without a child, and asks
    for its class, its truth and its attributes.
    """

    def __init__(self, block: nn.Module, name: str, child: object):
        # torch.compile of torch 2.11 knows no other way past `__setattr__`.
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "child", child)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Return the gated output of the child."""
        attributes = vars(self)
        return pass_gates(attributes["block"], attributes["name"], attributes["child"](*args, **kwargs))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return the gated output of the child's forward, which does not call the child's hooks."""
        attributes = vars(self)
        return pass_gates(attributes["block"], attributes["name"], attributes["child"].forward(*args, **kwargs))

    def __getattr__(self, name: str) -> object:
        if "child" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["child"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["child"], name, value)

    def __len__(self) -> int:
        return len(vars(self)["child"])

    def __iter__(self) -> Iterator[object]:
        return iter(vars(self)["child"])

    def __getitem__(self, key: object) -> object:
        return vars(self)["child"][key]

    def __bool__(self) -> bool:
        return "child" not in vars(self) or bool(vars(self)["child"])

    if not TYPE_CHECKING:

        @property
        def __class__(self):
            """The class of the child, for isinstance."""
            attributes = vars(self)
            return type(attributes["child"]) if "child" in attributes else GatedCall


def pass_gates(block: nn.Module, name: str, x: Tensor) -> Tensor:
    """Pass ``x``, the output of the child ``name`` of ``block``, through the gates there, one after the other."""
    for key, record in vars(block)[RECORDS].items():
        if record.target == name:
            x = pass_gates(block, key, apply_gate(find_gate(block, key), x, record.axis))
            if record.acts is not None:
                record.acts += 1
    return x


def find_gate(block: nn.Module, key: str) -> nn.Module:
    """Return the child ``key`` of ``block``, whatever module stands there now.

    Raises:
        AttachError: it was deleted.
    """
    gate = children_of(block).get(key)
    if gate is None:
        raise AttachError(
            f"the gate {key!r} of {type(block).__name__} was deleted; ecanet.detach(model) takes gates out"
        )
    return gate


# classes


@cache
def make_gated_class(original: type[nn.Module]) -> type[Gated]:
    """Return the subclass of ``original`` that applies gates, under the same name and module.

    Trees that torch.fx does not enter are known by their class's module, so that stays the same, too.
    """

    @wraps(original.forward)  # torch.fx and torch.export read the names of the arguments from the original
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        view = view_inside(self)
        return pass_gates(self, "", type(view).forward(view, *args, **kwargs))

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return derive_class(Gated, original, {**names, "forward": forward})


@cache
def make_inside_class(block: type[nn.Module]) -> type[Inside]:
    """Return the class of the inside view of a block whose class is now ``block``."""
    return cast("type[Inside]", type(block.__name__, (Inside, block), {"__module__": block.__module__}))


def find_original_class(block: nn.Module) -> type[nn.Module]:
    """Return the class that ``block`` had before attach."""
    kinds = type(block).__mro__
    return kinds[kinds.index(Gated) + 1]


def make_empty(original: type[nn.Module]) -> nn.Module:
    """Return a gated block without content, for pickle and deepcopy to fill."""
    return nn.Module.__new__(make_gated_class(original))


def view_inside(block: nn.Module) -> Inside:
    """Return the inside view of ``block``."""
    attributes = vars(block)
    (view,) = cast("tuple[Inside | None]", attributes.get(VIEW, (None,)))
    if torch.compiler.is_compiling() and view is not None:
        return view
    kind = make_inside_class(type(block))
    # A copy of the dictionary (a replica of DataParallel) still holds the view of the original.
    if view is None or type(view) is not kind or vars(view) is not attributes:
        view = object.__new__(kind)  # the __new__ of FSDP's classes makes other objects
        object.__setattr__(view, "__dict__", attributes)
        attributes[VIEW] = (view,)
    return view


def find_function(block: nn.Module, forward: object) -> FunctionType | None:
    """Return the function behind ``forward``, a new forward of ``block`` that is a method of it.

    Such are ``types.MethodType(function, block)`` and ``block.forward_fused``. Return None for a wrapper of the present
    forward, made by `functools.wraps`, and for the present forward itself: these lead to the gates.

    Raises:
        AttachError: it is none of these.
    """
    if isinstance(forward, MethodType) and forward.__self__ in (block, view_inside(block)):
        own = forward.__func__ is type(block).forward
        return None if own else cast(FunctionType, forward.__func__)
    inner = forward
    while (wrapped := getattr(inner, "__wrapped__", None)) is not None:
        if isinstance(wrapped, MethodType) and wrapped.__self__ is block:
            return None
        inner = wrapped
    raise AttachError(
        f"a new forward for {type(block).__name__} would leave out its attached gates; ecanet.detach(model) first, or "
        f"set a method: types.MethodType(function, block)"
    )


# in and out


def install(block: nn.Module, key: str, gate: nn.Module, record: Record) -> None:
    """Make ``gate`` the child ``key`` of ``block`` and apply it where ``record`` says."""
    attributes = vars(block)
    if not isinstance(block, Gated):
        block.__class__ = make_gated_class(type(block))
        attributes[RECORDS] = {}
        own = attributes.get("forward")
        if isinstance(own, MethodType) and own.__self__ is block:  # it was set before
            attributes[FORWARD] = attributes.pop("forward").__func__
    attributes[RECORDS][key] = record
    block.add_module(key, gate)
    view_inside(block)


def uninstall(block: nn.Module, key: str) -> None:
    """Remove a gate: the inverse of `install`."""
    children_of(block).pop(key, None)
    attributes = vars(block)
    attributes[RECORDS].pop(key)
    if not attributes[RECORDS]:
        take_apart(block)


def list_records(module: nn.Module) -> dict[str, Record]:
    """Return the records of the gates that ``module`` applies, by the names of the gates."""
    return vars(module)[RECORDS] if isinstance(module, Gated) else {}


def take_apart(block: nn.Module) -> dict[str, str]:
    """Give ``block`` its original class back, in place; return the targets of its gates by the gates' names.

    The gates stay children of the block and act no more: for copies that run them in another way.
    """
    targets = {key: record.target for key, record in list_records(block).items()}
    if isinstance(block, Gated):
        attributes = vars(block)
        cast(nn.Module, block).__class__ = find_original_class(block)
        del attributes[RECORDS], attributes[VIEW]
        if FORWARD in attributes:
            attributes["forward"] = MethodType(attributes.pop(FORWARD), block)
    return targets
