"""Run tests as on a machine with a GPU, without one: PYTHONPATH=src:tests pytest -p simulated_gpu -m gpu tests/ops

Tensors stay on the CPU, where Triton's interpreter runs the kernels, so that values are right. Each storage has a mark
that says on which device it would be: new tensors on the GPU unless a test asks for the CPU, results where their inputs
are. A test fails as it would with compiled kernels: where a tensor of the CPU reaches a kernel or meets one of the GPU,
or where a generator of the CPU draws for the GPU. Tests that compile or trace are skipped: no marks are seen inside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tensors
from ecanet.ops.nodes import is_batched

GPU = torch.device("cuda", 0)


on_gpu: dict[int, torch.UntypedStorage] = {}
"""The storages that would be on the GPU. They are kept while a test runs, so that no other one gets their number."""


def forget_unused() -> None:
    """Drop the marks of storages that nothing else holds any more: constants that the library keeps stay marked."""
    for number in [number for number in on_gpu if torch._C._storage_Use_Count(number) == 1]:
        del on_gpu[number]


class WrongDeviceError(RuntimeError):
    """Tensors of both devices meet."""


def find_storage(x: Tensor) -> torch.UntypedStorage | None:
    """Return the storage that has the mark of ``x``, None for tensors without values: meta and fake ones.

    Gradients that come in a batch (``is_grads_batched``) have the mark of the tensor that holds the batch.
    """
    if x.is_meta or isinstance(x, FakeTensor):
        return None
    if is_batched(x):
        x = torch._remove_batch_dim(x, 1, 1, 0)
    return x.untyped_storage()


def is_marked(x: Tensor) -> bool:
    """Return whether ``x`` would be on the GPU."""
    with torch._C.DisableTorchFunction():
        storage = find_storage(x)
    return storage is not None and storage._cdata in on_gpu


def mark(result: Any, gpu: bool) -> Any:
    """Return ``result``, whose tensors are said to be on the GPU, or not."""
    with torch._C.DisableTorchFunction():
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = find_storage(x)
                if storage is None:
                    continue
                if gpu:
                    on_gpu[storage._cdata] = storage
                else:
                    on_gpu.pop(storage._cdata, None)
    return result


_made_in_backward = False
"""True while tensors made from no other ones are PyTorch's own in a backward: it makes them where the gradients are."""


@contextlib.contextmanager
def expect_from_backward(expected: bool) -> Iterator[None]:
    """Say whether tensors that are made from no other ones are PyTorch's own in a backward."""
    global _made_in_backward
    before, _made_in_backward = _made_in_backward, expected
    try:
        yield
    finally:
        _made_in_backward = before


class _Results(TorchDispatchMode):
    """Marks the results of operations as their inputs are, and refuses inputs of both devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marks = {is_marked(x) for x in given if x.dim() and not x.is_meta}
        copies = func.name() in ("aten::copy_", "aten::_to_copy", "aten::index.Tensor")
        if len(marks) > 1 and not copies:
            raise WrongDeviceError(f"{func.name()}: expected all tensors on one device, found two: cuda:0 and cpu")
        if func.namespace == "ecanet" and not types:  # a subclass, such as a fake tensor, comes first
            # Both modes are off here, so the Python code of an operator needs them again. Under the mode, an ordinary
            # call would come back to this function.
            with self, _Devices(torch.device("cpu")):
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        if not given:
            return mark(result, True) if _made_in_backward else result
        if func.name() == "aten::copy_" or func.name().startswith("aten::set_"):
            return result
        return mark(result, any(marks) if marks else any(map(is_marked, given)))


class _Devices(TorchFunctionMode):
    """Lets functions take and name a device that does not exist. ``default`` is where they make tensors unless told."""

    def __init__(self, default: torch.device) -> None:
        super().__init__()
        self.default = default

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:
            return is_marked(args[0])
        if func in (Tensor.device.__get__, Tensor.get_device) and is_marked(args[0]):
            return GPU if func == Tensor.device.__get__ else GPU.index
        asked = [x for x in tree_leaves((args, kwargs)) if _is_device(x)]
        wants_gpu, wants_cpu = (any(_is_device(x, kind) for x in asked) for kind in ("cuda", "cpu"))
        if func in _device_constructors() and not asked:
            wants_gpu, kwargs = self.default == GPU, {**kwargs, "device": "cpu"}
        draws = wants_gpu or any(is_marked(x) for x in args if isinstance(x, Tensor))
        if draws and kwargs.get("generator") is not None:
            raise WrongDeviceError("expected a 'cuda' device type for generator but found 'cpu'")
        args, kwargs = tree_map(lambda x: "cpu" if _is_device(x, "cuda") else x, (args, kwargs))
        if func == Tensor.cpu or (func == Tensor.to and wants_cpu):
            return mark(args[0].clone(), False) if is_marked(args[0]) else func(*args, **kwargs)
        with expect_from_backward(False) if func in _device_constructors() else contextlib.nullcontext():
            result = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__deepcopy__":
            return mark(result, is_marked(args[0]))
        if not wants_gpu:
            return result
        if func == Tensor.to and result is args[0] and not is_marked(result):
            result = result.clone()
        return mark(result, True)


def _is_device(x: Any, kind: str = "") -> bool:
    name = str(x) if isinstance(x, torch.device | str) else ""
    return name.partition(":")[0] in ({kind} if kind else {"cpu", "cuda", "meta"})


def skip_compiled(*args: Any, **kwargs: Any) -> NoReturn:
    """Skip the test that compiles or traces a function."""
    pytest.skip("the marks do not reach inside of compiled and traced functions")


def pretend_device(patch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's functions that take no tensor know the device, and Python code that they call see the marks."""
    enter_autocast, count_modes = torch.autocast.__init__, torch._C._len_torch_dispatch_stack
    save_by, run_backward = torch.autograd.graph.saved_tensors_hooks.__init__, torch.autograd._engine_run_backward

    def run_backward_on_gpu(*args: Any, **kwargs: Any) -> Any:
        # A mode is off while it handles a function, so also in the Python code that a backward runs. PyTorch's default
        # device is a mode too, so that tensors made there without a device are on the CPU.
        with _Devices(torch.device("cpu")), expect_from_backward(True):
            return run_backward(*args, **kwargs)

    def save_on_gpu(hooks: torch.autograd.graph.saved_tensors_hooks, *functions: Callable[[Any], Any]) -> None:
        def call(function: Callable[[Any], Any], x: Any) -> Any:
            with _Devices(torch.device("cpu")):  # off here, as in a backward
                return function(x)

        save_by(hooks, *(functools.partial(call, function) for function in functions))

    def autocast_on_gpu(
        context: torch.autocast, device_type: str, dtype: torch.dtype | None = None, **settings: Any
    ) -> None:
        dtype = dtype or (torch.float16 if _is_device(device_type, "cuda") else None)
        enter_autocast(context, "cpu", dtype, **settings)

    def count_other_modes() -> int:
        modes = (torch._C._get_dispatch_stack_at(index) for index in range(count_modes()))
        return sum(not isinstance(mode, _Results) for mode in modes)

    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
    patch.setattr(torch.autocast, "__init__", autocast_on_gpu)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        ask = getattr(torch, name)
        patch.setattr(torch, name, lambda kind="cpu", ask=ask: ask("cpu"))
    patch.setattr(torch, "compile", skip_compiled)
    patch.setattr(torch.jit, "trace", skip_compiled)
    patch.setattr(torch._C, "_len_torch_dispatch_stack", count_other_modes)
    patch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", save_on_gpu)
    patch.setattr(torch.autograd, "_engine_run_backward", run_backward_on_gpu)


def pretend_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let the library take the interpreted kernels for compiled ones, which passed their proof on this machine."""
    from triton.runtime.interpreter import GridExecutor

    from ecanet.ops import choices, proof, proof_records
    from ecanet.ops.triton import launch

    run_kernel = GridExecutor.__call__

    def run_kernel_on_gpu(kernel: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if not all(is_marked(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            raise WrongDeviceError("a tensor on the CPU is handed to a kernel")
        run_kernel(kernel, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", run_kernel_on_gpu)
    patch.setattr(launch, "INTERPRETED", False)  # not that of `expansion`: it says how products are rounded, too
    patch.setattr(proof_records, "describe_gpu", lambda device: None)  # nothing is recorded
    patch.setattr(proof_records, "has_passed", lambda *key: True)  # the interpreter would take minutes for the proof
    patch.setattr(proof, "_passed", {})
    patch.setattr(choices, "_choices", {})


@contextlib.contextmanager
def simulate() -> Iterator[None]:
    """Simulate a GPU on which tensors are made by default."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_device(patch)
        pretend_kernels(patch)
        forget_unused()
        with _Results(), _Devices(GPU):
            yield


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Choose the device after conftest.py, which found none."""
    tensors.DEVICE = GPU.type


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Run each test on the simulated GPU."""
    with simulate():
        return (yield)
