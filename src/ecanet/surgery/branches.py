"""Which operand of an addition is a residual branch, and what lies on its way: questions about values alone.

An addition ends a residual block if one operand, the shortcut, is an ancestor of the other, the branch: as it is, or
through at most one convolution without an activation; and the branch has an activation on its way. So the inner sums
of RepVGG (no activation), HRNet (no common ancestor) and Res2Net (another slice) are none.
"""

from ecanet.surgery.watch import CONVOLUTIONS, NORMS, PRODUCTS, Call, Value

_LINEAR = (
    "add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__ __rsub__ neg mean sum expand input detach "
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout requires_grad_ __get__ "
    "contiguous clone to type float half bfloat16 double type_as pad roll pixel_shuffle pixel_unshuffle "
    "cat concat concatenate stack split chunk unbind tensor_split __getitem__ narrow select permute transpose swapaxes "
    "movedim reshape view flatten unflatten squeeze unsqueeze avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d interpolate upsample"
)
LINEAR = frozenset(_LINEAR.split(" "))
"""Operations that are not an activation; convolutions, norms and products with a constant belong to them too."""

MERGES = frozenset(["cat", "concat", "concatenate", "stack", "split", "chunk", "unbind", "tensor_split"])
"""Linear operations that a shortcut does not pass: Res2Net's slices are branches of their own."""


WHOLES = ("module", "multi_head_attention_forward", "scaled_dot_product_attention")
"""Operations with weights of their own inside: a gate before them would be at the start of a branch."""


def branch_of(a: Value, b: Value, start: int) -> Value | None:
    """The operand that is a residual branch, the other being its shortcut; None if neither is.

    Only what was made since ``start``, and what that was made of, is looked at.
    """
    best: tuple[int, Value] | None = None
    for shortcut, branch in ((a, b), (b, a)):
        reachable = ancestors(branch, start)
        for convolutions, value in shortcut_path(shortcut, start):
            if value in reachable and value is not branch and activated(value, branch, reachable):
                if best is None or convolutions < best[0]:
                    best = convolutions, branch
                break
    return best[1] if best else None


def ancestors(value: Value, start: int) -> set[Value]:
    """Everything that ``value`` was made of, back to what was there before ``start``."""
    seen, queue = {value}, [value]
    while queue:
        here = queue.pop()
        if here.index >= start:
            new = [parent for parent in here.parents if parent not in seen]
            seen.update(new)
            queue += new
    return seen


def shortcut_path(value: Value, start: int) -> list[tuple[int, Value]]:
    """``value`` and what came before it on a shortcut, each with the number of convolutions passed so far."""
    path, convolutions = [(0, value)], 0
    while value.index >= start and len(value.parents) == 1 and is_linear(value) and value.op not in MERGES:
        convolutions += value.op in CONVOLUTIONS
        if convolutions > 1:
            break
        value = value.parents[0]
        path.append((convolutions, value))
    return path


def activated(source: Value, branch: Value, within: set[Value]) -> bool:
    """Whether some way from ``source`` to ``branch`` leads through an activation."""
    passed = {source: False}
    for value in sorted(within, key=lambda v: v.index):
        from_here = [passed[parent] for parent in value.parents if parent in passed]
        if from_here and value is not source:
            passed[value] = any(from_here) or not is_linear(value)
    return passed.get(branch, False)


def is_linear(value: Value) -> bool:
    """Whether the operation behind ``value`` is no activation."""
    if value.op in PRODUCTS:
        return len(value.parents) == 1
    return value.op in LINEAR or value.op in CONVOLUTIONS or value.op in NORMS


def only_scales(value: Value, call: Call) -> bool:
    """Whether ``call`` does nothing but multiply its input by a constant (layer scale)."""
    return value.op in PRODUCTS and len(value.parents) == 1 and value.parents[0] in call.inputs


def step_back(value: Value) -> Value | None:
    """What ``value`` was made of, if a gate may stand before that operation: one operand, or a product's larger one."""
    if value.op in CONVOLUTIONS or value.op in NORMS or value.op in MERGES or value.op in WHOLES:
        return None
    if len(value.parents) == 1:
        return value.parents[0]
    if value.op in PRODUCTS and value.parents:
        return max(value.parents, key=lambda v: v.shape.numel())
    if value.op in ("sub", "__sub__") and len(value.parents) == 2:  # x + a (f(x) - x): EfficientViM's residual
        return max(value.parents, key=lambda v: v.index)
    return None
