"""Find channel attention in the graphs of a network, where it is no module, and make modules of it to be replaced."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import fx, nn

from ecanet.surgery.graphs import Moved, find_block, group, is_editable, ungroup
from ecanet.surgery.insertion import find_free_key
from ecanet.surgery.modules import list_modules
from ecanet.surgery.recording import ADDITIONS, PRODUCTS, Trace, Value
from ecanet.surgery.records import read_record

LIMIT = 64
"""Number of nodes that may lie between the means and the product. Squeeze-excite from ONNX has about fifteen."""


@contextmanager
def group_attention(model: nn.Module, trace: Trace, replace: object) -> Generator[None]:
    """Run the body, which replaces modules, with one module for each part of a graph that may be channel attention.

    Afterwards the parts that were not replaced are nodes of their graph again. A class or a function as ``replace``
    selects modules of the network itself, so nothing is grouped then.
    """
    groups = list(group_all(model, trace)) if isinstance(replace, str) else []
    try:
        yield
    finally:
        for module, moved in reversed(groups):
            ungroup(model, module, moved)
        left: dict[nn.Module | None, Moved] = dict(groups)
        for gate in model.modules():
            record = read_record(gate)
            if record is not None and record.replaced in left:
                record.moved = left[record.replaced]


def group_all(model: nn.Module, trace: Trace, *, with_sum: bool = False) -> Generator[tuple[fx.GraphModule, Moved]]:
    """Make modules of the parts of all graphs that may be channel attention; yield each, and what left the graph.

    With ``with_sum`` the module of x + x * f(x) is all of it and not the product alone.
    """
    for _, module in list_modules(model):
        if not isinstance(module, fx.GraphModule) or not is_editable(module):
            continue
        values = {node: value for graph, node, value in reversed(trace.steps) if graph is module}
        for node in list(module.graph.nodes):
            found, last = find_product(node, values, trace.changing), node
            if found is None:
                continue
            source, body = found
            total = find_sum(last, source, values) if with_sum else None
            if total is not None:
                body, last = [*body, last], total
            block = find_block(module, last)
            key = find_free_key(module.get_submodule(block), "attention")
            grouped, call, moved = group(module, source, body, last, f"{block}.{key}".lstrip("."))
            values[call] = values[last]
            yield grouped, moved


def find_product(
    last: fx.Node, values: dict[fx.Node, Value], changing: set[fx.Node]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return x and the nodes of f, in order, if ``last`` is x * f(x) and f has a step of one number for each plane.

    ``changing`` are the nodes that change an operand in place.
    """
    value, operands = values.get(last), last.all_input_nodes
    if value is None or value.op not in PRODUCTS or len(operands) != 2 or len(value.shape) < 3:
        return None
    for source, factor in (operands, operands[::-1]):
        x = values.get(source)
        if x is None or x.shape != value.shape or factor not in values:
            continue
        body = find_body(source, factor)
        if body is None or not any(reduces(values[node], x) for node in body if node in values):
            continue
        # A node that changes x in place ties the others to their order.
        others = [node for node in source.users if node is not last]
        outside = any(node not in body for node in others)
        if changing.isdisjoint([*others, *([last] if outside else [])]):
            return source, body
    return None


def find_sum(product: fx.Node, source: fx.Node, values: dict[fx.Node, Value]) -> fx.Node | None:
    """Return the node that adds ``source`` to the ``product`` and alone reads that, if there is one."""
    reader, *others = product.users
    value = values.get(reader)
    adds = value is not None and value.op in ADDITIONS and set(reader.all_input_nodes) == {product, source}
    return reader if adds and not others else None


def reduces(value: Value, x: Value) -> bool:
    """Return whether the operation that made ``value`` leaves one number of each plane of ``x``."""
    names = ("mean", "sum", "pool") if x.shape[2:].numel() == 1 else ("",)
    return value.shape.numel() == x.shape[:2].numel() and any(name in value.op for name in names)


def find_body(source: fx.Node, factor: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from ``source`` to ``factor``, in order; None if those depend on another input, or are many."""
    body: set[fx.Node] = set()
    queue = [factor]
    while queue:
        node = queue.pop()
        if node is source or node in body:
            continue
        body.add(node)
        if node.op == "placeholder" or len(body) > LIMIT:
            return None
        queue += node.all_input_nodes
    return [node for node in factor.graph.nodes if node in body]
