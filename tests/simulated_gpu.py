"""Run tests as on a machine with a GPU, without one: PYTHONPATH=src:tests pytest -p simulated_gpu -m gpu tests/ops

Tensors stay on the CPU, where Triton's interpreter runs the kernels, so that values are right. Each storage has a mark
that says on which device it would be: new tensors on the GPU unless a test asks for the CPU, results where their inputs
are. A test fails as it would with compiled kernels: where a tensor of the CPU reaches a kernel or meets one of the GPU,
or where a generator of the CPU draws for the GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tensors

GPU = torch.device("cuda", 0)


on_gpu: dict[int, torch.UntypedStorage] = {}
"""The storages that would be on the GPU. They are kept while a test runs, so that no other one gets their number."""


def forget_unused() -> None:
    """Drop the marks of storages that nothing else holds any more: constants that the library keeps stay marked."""
    for number in [number for number in on_gpu if torch._C._storage_Use_Count(number) == 1]:
        del on_gpu[number]


class WrongDeviceError(RuntimeError):
    """Tensors of both devices meet."""


def is_marked(x: Tensor) -> bool:
    """Return whether ``x`` would be on the GPU."""
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata in on_gpu


def mark(result: Any, gpu: bool) -> Any:
    """Return ``result``, whose tensors are said to be on the GPU, or not."""
    with torch._C.DisableTorchFunction():
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if gpu:
                    on_gpu[storage._cdata] = storage
                else:
                    on_gpu.pop(storage._cdata, None)
    return result


class _Results(TorchDispatchMode):
    """Marks the results of operations as their inputs are, and refuses inputs of both devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marks = {is_marked(x) for x in given if x.dim()}
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
        if not given or func.name() == "aten::copy_" or func.name().startswith("aten::set_"):
            return result
        return mark(result, any(marks) if marks else any(map(is_marked, given)))


class _Devices(TorchFunctionMode):
    """Lets functions take and name a device that does not exist. ``default`` is where they make tensors unless told."""

    def __init__(self, default: torch.device) -> None:
        super().__init__()
        self.default = default

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:
            return is_marked(args[0])
        if func == Tensor.device.__get__:
            return GPU if is_marked(args[0]) else func(*args)
        asked = [x for x in tree_leaves((args, kwargs)) if _is_device(x)]
        wants_gpu = any(_is_device(x, "cuda") for x in asked)
        if func in _device_constructors() and not asked:
            wants_gpu, kwargs = self.default == GPU, {**kwargs, "device": "cpu"}
        draws = wants_gpu or any(is_marked(x) for x in args if isinstance(x, Tensor))
        if draws and kwargs.get("generator") is not None:
            raise WrongDeviceError("expected a 'cuda' device type for generator but found 'cpu'")
        args, kwargs = tree_map(lambda x: "cpu" if _is_device(x, "cuda") else x, (args, kwargs))
        if func == Tensor.cpu or (func == Tensor.to and asked and not wants_gpu):
            return mark(args[0].clone(), False) if is_marked(args[0]) else func(*args, **kwargs)
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
    return name.partition(":")[0] in ({kind} if kind else {"cpu", "cuda"})


@contextlib.contextmanager
def simulate() -> Iterator[None]:
    """Simulate a GPU on which tensors are made by default."""
    from ecanet.ops import proof_records
    from ecanet.ops.triton import launch
    from ecanet.ops.triton.launch import Launch

    call, run_backward = Launch.__call__, torch.autograd.graph._engine_run_backward

    def check_launch(kernel: Launch, *tensors: Tensor | None) -> None:
        for x in tensors:
            if x is not None and not is_marked(x):
                raise WrongDeviceError("a tensor on the CPU is handed to a kernel")
        call(kernel, *tensors)

    def run_backward_on_gpu(*args: Any, **kwargs: Any) -> Any:
        # A mode is off while it handles a function, so also in the Python code that a backward runs. PyTorch's default
        # device is a mode too, so that tensors made there without a device are on the CPU.
        with _Devices(torch.device("cpu")):
            return run_backward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
        patch.setattr(proof_records, "has_passed", lambda *key: False)
        patch.setattr(proof_records, "record_success", lambda *key: None)
        patch.setattr(launch, "INTERPRETED", False)
        patch.setattr(Launch, "__call__", check_launch)
        patch.setattr(torch.autograd, "_engine_run_backward", run_backward_on_gpu)
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
    try:
        with simulate():
            return (yield)
    except RuntimeError as error:
        # What the marks cannot follow is skipped, and counted as such: a compiler's graphs, and batched tensors.
        if "dispatch mode present" in str(error) or "batched_gradients" in pyfuncitem.name:
            pytest.skip("the marks do not reach inside of compiled or batched functions")
        raise
