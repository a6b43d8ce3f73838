"""Speed up Triton's interpreter, which the tests of kernels run in, and let all releases of it read numbers alike."""

import dataclasses
import os


def run_in_interpreter() -> None:
    """Interpret all kernels that are made from now on, faster than Triton does by itself."""
    os.environ["TRITON_INTERPRET"] = "1"
    speed_up_interpreter()
    describe_types_once()
    read_one_number()


def speed_up_interpreter() -> None:
    """Let Triton's interpreter do once what it would do again for each call and each operation.

    It prepares its language for each launch, not for each call of a device function, which takes longer than the
    function itself. It adds no check for overflow to each integer operation; compiled kernels have none either.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    find_dtype, dtypes = interpreter._get_np_dtype, {}

    def find_dtype_once(kind: tl.dtype) -> object:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(kind)
        return dtypes[name]

    interpreter._get_np_dtype = find_dtype_once
    initialize, contents = tl.tensor.__init__, {}

    def initialize_as_before(self: tl.tensor, handle: object, kind: tl.dtype) -> None:
        if kind.name not in contents:
            initialize(self, handle, kind)
            contents[kind.name] = {**vars(self)}
        vars(self).update(contents[kind.name], handle=handle)

    tl.tensor.__init__ = initialize_as_before
    call, prepared = InterpretedFunction.__call__, {tl}  # a launch prepares `tl` itself
    found = {}

    def call_prepared(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self not in found:
            found[self] = {value for value in self.fn.__globals__.values() if value is tl or value is tl.core}
        if found[self] <= prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.update(found[self])
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_prepared


def describe_types_once() -> None:
    """Let Triton's interpreter describe the type of a block once, and spread no block over another of its shape."""
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
    except ImportError:
        return
    describe, described = tl.block_type.__init__, {}

    def describe_once(self: tl.block_type, element_ty: tl.dtype, shape: list[int]) -> None:
        key = (element_ty.name, *shape)
        if not all(type(size) is int for size in key[1:]):
            describe(self, element_ty, shape)
            return
        if key not in described:
            describe(self, element_ty, shape)
            described[key] = {**vars(self)}
        vars(self).update(described[key], element_ty=element_ty)

    tl.block_type.__init__ = describe_once
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unequal(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and [*a.shape] == [*b.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unequal


def read_one_number() -> None:
    """Let the interpreter of Triton 3.6 take an array of one element for a number, as later ones do.

    NumPy warns of its way, and from 2.4 on refuses it.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
