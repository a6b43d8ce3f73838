"""Edit the graph of a `torch.fx.GraphModule`: put a gate behind a node, and make one module of several nodes.

In such a graph (a symbolic trace, an exported program, a network from ONNX) a block is no module but a row of nodes,
many of which call functions. So a gate is a node of its own there.
"""

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ecanet.surgery.modules import list_modules, read_version

Note = Callable[[nn.Module, fx.Node, object, bool], None]
"""A function of a graph, one of its nodes, what that node returned, and whether it changed its operands in place."""

HOLDERS = ("_parameters", "_buffers", "_modules")
"""The dictionaries in which a module keeps what a graph names."""

Moved = list[tuple[str, str, list[str]]]
"""What left the module of a graph for a grouped module: the name, the dictionary, and the order of names in that."""


def is_editable(module: fx.GraphModule) -> bool:
    """Return whether the forward of ``module`` is one graph, which can be edited.

    torchvision's feature extractors have two, for training and evaluation; a new ``forward`` hides the graph.
    """
    graphs = [value for value in vars(module).values() if isinstance(value, fx.Graph)]
    return len(set(map(id, graphs))) == 1 and "forward" not in vars(module)


@contextmanager
def run_by_nodes(model: nn.Module, note: Note) -> Generator[None]:
    """While active, run the graphs in ``model`` node by node and pass each result to ``note``."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule) and is_editable(module)]
    for module in graphs:
        vars(module)["forward"] = partial(run_nodes, module, note)
    try:
        yield
    finally:
        for module in graphs:
            del vars(module)["forward"]


def run_nodes(module: fx.GraphModule, note: Note, *args: object, **kwargs: object) -> object:
    """Return the output of ``module``, run node by node."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return NodeRunner(module, note).run(*bound.args[1:], *bound.kwargs.values())


class NodeRunner(fx.Interpreter):
    """Run a graph and pass what each node returned to ``note``."""

    def __init__(self, module: fx.GraphModule, note: Note):
        super().__init__(module)
        self.note = note

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        operands = [value for node in n.all_input_nodes if isinstance(value := self.env[node], Tensor)]
        versions = [read_version(operand) for operand in operands]
        result = super().run_node(n)
        if n.op not in ("get_attr", "output"):
            self.note(self.module, n, result, versions != [read_version(operand) for operand in operands])
        return result


# gates behind nodes


def insert_gate(model: nn.Module, graph: str, node: str, name: str, gate: nn.Module, axis: int) -> None:
    """Put ``gate``, under ``name``, behind the node called ``node`` of the graph module called ``graph``.

    All that read the node read the gate's output instead. ``axis`` is the axis of the channels.
    """
    module = get_graph(model, graph)
    target = name[len(graph) + 1 if graph else 0 :]
    module.add_submodule(target, gate)
    source = next(one for one in module.graph.nodes if one.name == node)
    readers = list(source.users)
    steps: list[tuple[object, tuple[int, ...]]] = [(target, ())]
    if axis != 1:
        steps = [(torch.movedim, (axis, 1)), *steps, (torch.movedim, (1, axis))]
    last = source
    for what, rest in steps:
        with module.graph.inserting_after(last):
            create = module.graph.call_module if what is target else module.graph.call_function
            last = cast(Any, create)(what, (last, *rest))
    for reader in readers:
        reader.replace_input_with(source, last)
    module.recompile()


def remove_gate(model: nn.Module, name: str, gate: nn.Module, axis: int) -> None:
    """Take a gate out of its graph: the inverse of `insert_gate`."""
    for module, node in find_nodes(model, gate):
        first, last = node, node
        if axis != 1:
            first, last = node.all_input_nodes[0], next(iter(node.users))
        last.replace_all_uses_with(first.all_input_nodes[0])
        for one in dict.fromkeys((last, node, first)):
            module.graph.erase_node(one)
        module.recompile()
    parent, _, key = name.rpartition(".")
    delattr(model.get_submodule(parent), key)


def find_nodes(model: nn.Module, called: nn.Module) -> list[tuple[fx.GraphModule, fx.Node]]:
    """Return the nodes that call the module ``called``, each with the graph module that has it."""
    return [
        (module, node)
        for _, module in list_modules(model)
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_module" and module.get_submodule(str(node.target)) is called
    ]


def find_block(module: fx.GraphModule, node: fx.Node) -> str:
    """Return the name, in ``module``, of the block to which ``node`` belongs; "" if there is none.

    It is a module that only holds the block's parts: others might run a gate among them as one more entry.
    """
    name = ""
    if node.op == "call_module":
        name = str(node.target).rpartition(".")[0]
    elif stack := node.meta.get("nn_module_stack"):
        name = str(next(reversed(stack.values()))[0])
        if not is_holder(module, name) or not any(True for _ in module.get_submodule(name).children()):
            name = name.rpartition(".")[0]
    return name if is_holder(module, name) else ""


def is_holder(module: nn.Module, name: str) -> bool:
    """Return whether ``module`` has a submodule of this name without a forward of its own."""
    try:
        return type(module.get_submodule(name)) is nn.Module
    except AttributeError:
        return False


def get_graph(model: nn.Module, name: str) -> fx.GraphModule:
    """Return the graph module called ``name``."""
    module = model.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    return module


# one module in the place of several nodes


def group(
    module: fx.GraphModule, source: fx.Node, body: Iterable[fx.Node], last: fx.Node, name: str
) -> tuple[fx.GraphModule, fx.Node, Moved]:
    """Make one module, called ``name``, of the nodes ``body`` and ``last``, which depend on ``source`` alone.

    Nodes, parameters and modules that are then unused leave ``module``. Return the new module, the node that calls it,
    and what left.
    """
    nodes = [*body, last]
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last])
    grouped = fx.GraphModule(module, graph)
    module.add_submodule(name, grouped)
    with module.graph.inserting_before(last):
        call = module.graph.call_module(name, (source,))
    last.replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            module.graph.erase_node(node)
    moved: Moved = []
    used = list_targets(module.graph.nodes)
    for target in sorted(list_targets(nodes) - used):
        prefix, _, key = target.rpartition(".")
        owner = vars(module.get_submodule(prefix))
        holder = next((h for h in HOLDERS if key in owner[h]), None)
        if holder and not any(other.startswith(target + ".") for other in used):
            moved.append((target, holder, list(owner[holder])))
            del owner[holder][key]
    module.recompile()
    return grouped, call, moved


def list_targets(nodes: Iterable[fx.Node]) -> set[str]:
    """Return the names of the modules, parameters and buffers that ``nodes`` use."""
    return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}


def ungroup(model: nn.Module, grouped: fx.GraphModule, moved: Moved) -> None:
    """Put the nodes of a grouped module back into the graph that calls it: the inverse of `group`."""
    for module, node in find_nodes(model, grouped):
        module.delete_submodule(str(node.target))
        for target, holder, order in reversed(moved):
            prefix, _, key = target.rpartition(".")
            theirs, ours = vars(grouped.get_submodule(prefix))[holder], vars(module.get_submodule(prefix))[holder]
            ours[key] = theirs[key]
            for name in [name for name in order if name in ours]:
                ours[name] = ours.pop(name)
        copies: dict[fx.Node, fx.Node] = {}
        with module.graph.inserting_before(node):
            for inner in grouped.graph.nodes:
                if inner.op == "placeholder":
                    copies[inner] = node.all_input_nodes[0]
                elif inner.op == "output":
                    node.replace_all_uses_with(copies[inner.all_input_nodes[0]])
                else:
                    copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
        module.graph.erase_node(node)
        module.recompile()
