"""Find out which operand of an addition is a residual branch, from values alone.

An addition ends a residual block if one operand, the shortcut, is an ancestor of the other, the branch. The shortcut
may pass at most one convolution and no activation; the branch passes an activation. So three kinds of inner sums do not
count: RepVGG's (no activation), HRNet's (no common ancestor) and Res2Net's (another slice of the tensor).
"""

import torch

from ecanet.surgery.recording import CONVOLUTIONS, NORMS, PRODUCTS, REORDERS, Call, Value

_LINEAR = (
    "add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__ __rsub__ neg mean sum expand input detach "
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout requires_grad_ __get__ "
    "contiguous clone to type float half bfloat16 double type_as pad roll pixel_shuffle pixel_unshuffle "
    "cat concat concatenate stack split chunk unbind tensor_split __getitem__ narrow select "
    "reshape view flatten unflatten squeeze unsqueeze avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d interpolate upsample"
)
LINEAR = REORDERS.union(_LINEAR.split(" "))
"""Operations that are no activation; convolutions, norms and products with a constant are none either."""

MERGES = frozenset(["cat", "concat", "concatenate", "stack", "split", "chunk", "unbind", "tensor_split"])
"""Linear operations that a shortcut does not pass: Res2Net's slices are branches of their own."""


OPAQUE = ("module", "multi_head_attention_forward", "scaled_dot_product_attention")
"""Operations with weights of their own inside: a gate before them would be at the start of a branch."""

INDICES = (torch.bool, torch.int32, torch.int64)
"""Types of tensors that select entries of other tensors."""


def find_branch(a: Value, b: Value, start: int) -> Value | None:
    """Return the operand of ``a + b`` that is a residual branch, the other being its shortcut; None if neither is.

    Only values made since ``start``, and their direct parents, are considered.
    """
    best: tuple[int, Value] | None = None
    for shortcut, branch in ((a, b), (b, a)):
        reachable = find_ancestors(branch, start)
        for convolutions, value in follow_shortcut(shortcut, start):
            if value in reachable and value is not branch and passes_activation(value, branch, reachable):
                if best is None or convolutions < best[0]:
                    best = convolutions, branch
                break
    return best[1] if best else None


def find_ancestors(value: Value, start: int) -> set[Value]:
    """Return ``value`` and every value that it was made from, back to those that existed before ``start``."""
    seen, queue = {value}, [value]
    while queue:
        here = queue.pop()
        if here.index >= start:
            new = [parent for parent in here.parents if parent not in seen]
            seen.update(new)
            queue += new
    return seen


def follow_shortcut(value: Value, start: int) -> list[tuple[int, Value]]:
    """Return ``value`` and its predecessors on a shortcut, each with the number of convolutions between them."""
    path, convolutions = [(0, value)], 0
    while value.index >= start and len(value.parents) == 1 and is_linear(value) and value.op not in MERGES:
        convolutions += value.op in CONVOLUTIONS
        # What an index selects (a detector's best anchors) is no shortcut around what the index was computed from.
        if convolutions > 1 or value.parents[0].dtype in INDICES:
            break
        value = value.parents[0]
        path.append((convolutions, value))
    return path


def passes_activation(source: Value, branch: Value, within: set[Value]) -> bool:
    """Return whether a path from ``source`` to ``branch`` leads through an activation."""
    passed = {source: False}
    for value in sorted(within, key=lambda v: v.index):
        from_here = [passed[parent] for parent in value.parents if parent in passed]
        if from_here and value is not source:
            passed[value] = any(from_here) or not is_linear(value)
    return passed.get(branch, False)


def is_linear(value: Value) -> bool:
    """Return whether the operation that made ``value`` is no activation."""
    if value.op in PRODUCTS:
        return len(value.parents) == 1
    return value.op in LINEAR or value.op in CONVOLUTIONS or value.op in NORMS


def find_projection(value: Value, start: int) -> Value | None:
    """Return the projection that ends an inverted residual block (MobileNetV2), if ``value`` is the block's result.

    That is a 1 x 1 convolution, not to more channels and without an activation after it. Before it is a depthwise
    convolution, or a k x k convolution to more channels (EfficientNetV2's fused form); a 1 x 1 expansion may stand
    between the two (MobileNetV4). Only values made since ``start`` are considered. None if there is no such projection.
    """
    projection = value
    while projection.op not in CONVOLUTIONS:
        one = len(projection.parents) == 1 or projection.op in ("cat", "concat")  # MixNet concatenates projections
        if projection.index < start or not one or not is_linear(projection):
            return None
        projection = projection.parents[0]
    if projection.index < start or not is_pointwise(projection) or compare_widths(projection) > 0:
        return None
    before = find_convolution_before(projection, start)
    if before is None or (is_pointwise(before) and compare_widths(before) <= 0):
        return None
    if is_pointwise(before):
        before = find_convolution_before(before, start)
        return projection if before is not None and is_depthwise(before) else None
    return projection if is_depthwise(before) or compare_widths(before) > 0 else None


def find_convolution_before(value: Value, start: int) -> Value | None:
    """Return the convolution that leads to the input of ``value``, back to values made since ``start``."""
    while value.parents:
        value = max(value.parents, key=lambda v: v.shape.numel())  # of a product with a gate: not the gate
        if value.index < start:
            return None
        if value.op in CONVOLUTIONS:
            return value
    return None


def is_pointwise(value: Value) -> bool:
    """Return whether a 1 x 1 convolution or a linear layer without groups made ``value``."""
    weight = value.weight
    return weight is not None and weight[2:].numel() == 1 and weight[1] == value.parents[0].channels


def is_depthwise(value: Value) -> bool:
    """Return whether a k x k convolution of each channel for itself made ``value``."""
    weight = value.weight
    return weight is not None and weight[2:].numel() > 1 and weight[1] == 1 and weight[0] == value.parents[0].channels


def compare_widths(value: Value) -> int:
    """Return how many more channels the convolution that made ``value`` returns than it takes; negative if fewer."""
    return 0 if value.weight is None else value.weight[0] - value.parents[0].channels


def is_layer_scale(value: Value, call: Call) -> bool:
    """Return whether ``call`` only multiplies its input by a constant."""
    return is_constant_product(value) and value.parents[0] in call.inputs


def is_constant_product(value: Value) -> bool:
    """Return whether ``value`` is another value times a constant."""
    return value.op in PRODUCTS and len(value.parents) == 1


def step_back(value: Value) -> Value | None:
    """Return the operand before ``value``'s operation, if a gate may stand there; of a product, the larger operand."""
    if value.op in CONVOLUTIONS or value.op in NORMS or value.op in MERGES or value.op in OPAQUE:
        return None
    if len(value.parents) == 1:
        return value.parents[0]
    if value.op in PRODUCTS and value.parents:
        return max(value.parents, key=lambda v: v.shape.numel())
    if value.op in ("sub", "__sub__") and len(value.parents) == 2:  # x + a (f(x) - x): EfficientViM's residual
        return max(value.parents, key=lambda v: v.index)
    return None
