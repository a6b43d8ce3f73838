"""Settings of every test run: the Triton interpreter, the profiles of random tests, and the command line."""

import dataclasses
import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import tensors
from quick_weights import speed_up_drawing


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


# The same cases in every run, so that a failure can be repeated; a loaded machine must not fail a test by its speed.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=4000, **COMMON)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Choose where kernels run, before anything imports Triton: compiled with ``-m gpu`` on a GPU, else interpreted.

    So no test hands a tensor of the CPU to a compiled kernel: those that are not marked run in the interpreter.
    """
    speed_up_drawing()
    os.fsync = lambda descriptor: None  # no test cuts the power
    gc.disable()  # until the tests are collected: the collector would walk through all modules again and again
    chosen = config.option.markexpr
    if torch.cuda.is_available() and "gpu" in chosen and "not gpu" not in chosen:
        tensors.DEVICE = "cuda"
        return
    os.environ["TRITON_INTERPRET"] = "1"
    speed_up_interpreter()
    describe_types_once()
    read_one_number()


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what stays to the end: modules and collected tests."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def make_tensors_on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the tensors of a test that is marked ``gpu`` on the GPU, if kernels are compiled."""
    if tensors.DEVICE == "cpu" or not request.node.get_closest_marker("gpu"):
        yield
        return
    with torch.device(tensors.DEVICE):
        yield


@pytest.fixture(autouse=True, scope="session")
def run_passes_on_small_tensors() -> Iterator[None]:
    """Let gates alone take the passes in training: the tensors of tests are small, and those of networks are not."""
    from ecanet.ops import lean

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "SMALL_SCALE", 0)
        yield


@pytest.fixture(autouse=True, scope="module")
def leave_figures_out(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """Leave the drawings out of the pages of runs, which take longer than the runs of the tests.

    The tests of ``tests/report`` look at drawings; any other test that does so takes the fixture ``figures``.
    """
    from ecanet.report import figures as module

    with pytest.MonkeyPatch.context() as patch:
        drawing = {name: draw for name, draw in vars(module).items() if name.startswith("plot_")}
        if request.path.parent.name != "report":
            for name in drawing:
                patch.setattr(module, name, lambda *values: "")
        yield drawing


@pytest.fixture
def figures(leave_figures_out: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of pages as a user's run does."""
    for name, draw in leave_figures_out.items():
        monkeypatch.setattr(f"ecanet.report.figures.{name}", draw)


@pytest.fixture
def interpreter() -> None:
    """Skip a test that looks into Triton's interpreter, or takes the CPU for a GPU, if kernels are compiled."""
    if tensors.DEVICE != "cpu":
        pytest.skip("needs Triton's interpreter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count the random tests among the slow ones under ``--hypothesis-profile=thorough``."""
    if config.getoption("--hypothesis-profile") == "thorough":
        for item in items:
            if item.get_closest_marker("random_cases"):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def ecanet(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command line in an empty folder: exit code, standard output, standard error."""
    from ecanet.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ecanet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call
