"""Find the operations of a run for which a GPU's program would wait, without a GPU.

Python enqueues work on a GPU and goes on. It has to wait where it needs a value (`item`, ``if tensor``), where a
result's size depends on values (`nonzero`, `bincount`, a boolean index), and where a copy from or to ordinary memory
is not marked ``non_blocking``. `torch.cuda.set_sync_debug_mode` warns of the same. Here tensors are PyTorch's fake
ones: they have a device, "cuda", and no values, and Lightning trains with them.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecanet import data
from ecanet.data import sources
from ecanet.recipes import Recipe
from ecanet.training import tasks, trainer
from ecanet.training.progress import History, quiet_lightning
from ecanet.training.steps import StepWatch
from ecanet.training.stopping import StopRequest
from ecanet.training.votes import Votes

GPU = torch.device("cuda", 0)
NEED_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Records operations that wait for the GPU as ``found``: phase, operation, and the line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.found: list[tuple[str, str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            self.found.append((self.phase, func.name().removeprefix("aten::"), find_line()))
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # fake tensors have no values: all is finite
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()  # fake tensors cannot be pinned
        return func(*args, **kwargs)

    def count(self, phase: str) -> list[tuple[str, str]]:
        """Return operation and line of each wait in ``phase``."""
        return [(name, line) for at, name, line in self.found if at == phase]


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the program would wait in ``func(*args, **kwargs)``."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    devices = {x.device.type for x in tensors}
    if func is torch.ops.aten._to_copy.default:
        devices.add(torch.device(kwargs.get("device") or args[0].device).type)
        return devices == {"cpu", "cuda"} and not kwargs.get("non_blocking", False)
    if func is torch.ops.aten.copy_.default:
        return devices == {"cpu", "cuda"} and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if func is torch.ops.aten.index.Tensor:
        # an index by integers has a known size; on the CPU it would be copied
        indices = [x for x in args[1] if x is not None]
        return args[0].is_cuda and any(x.dtype in (torch.bool, torch.uint8) or not x.is_cuda for x in indices)
    return "cuda" in devices and bool(NEED_VALUES & set(func.tags))


def find_line() -> str:
    """Return the innermost line of this library, else of another one that is not PyTorch."""
    frames = traceback.extract_stack()[:-2]
    ours = [f for f in frames if "/ecanet/" in f.filename] or [f for f in frames if "/torch/" not in f.filename]
    frame = ours[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.line}"


class _Loaded:
    """A loader of batches that were loaded before: real values that fake tensors do not have decided which they are."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _PretendedGPU(Accelerator):
    def setup_device(self, device: torch.device) -> None: ...
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...
    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"


class _Strategy(SingleDeviceStrategy):
    """The network is on the device already, and stays there.

    Autograd's engine refuses a device that does not exist, so gradients are made without it.
    """

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        for p in self.lightning_module.parameters():
            p.grad = torch.zeros_like(p)
        return closure_loss

    def model_to_device(self) -> None: ...
    def teardown(self) -> None: ...


class _Event:
    """An event of a step before, for which nobody waits."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class _FinishedError(Exception):
    """The epoch's batches are done; what follows once in an epoch may wait."""


class _Phases(L.Callback):
    """Says which batches are counted: neither the first one of a kind, which makes constants, nor the last one."""

    def __init__(self, waits: Waits, last: tuple[int, int]) -> None:
        self.waits, self.last = waits, last

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.waits.phase = "training" if batch_idx < self.last[0] - 1 else ""

    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.waits.phase = "validation"
        if batch_idx == self.last[1]:
            raise _FinishedError


def find_waits(recipe: Recipe, folder: Path) -> Waits:
    """Return the waits of an epoch of ``recipe``, which trains with fake tensors on a pretended GPU."""
    images = data.build(recipe.data, seed=recipe.seed)
    task = tasks.build(recipe, images.spec)
    batches = _Loaded(images.train_dataloader()), _Loaded(images.val_dataloader())
    watch = StepWatch(folder / "last.ckpt", recipe.checkpoint, StopRequest())
    found, fake = Waits(), FakeTensorMode(allow_non_fake_inputs=True)
    phases = _Phases(found, (len(batches[0]) - 1, len(batches[1]) - 1))
    with quiet_lightning(), _pretend(batches, images):
        lightning = trainer._make_trainer(recipe, task, folder, [History(folder / "m.csv"), watch, phases], GPU, 1)
        for callback in lightning.callbacks:
            if isinstance(callback, WeightAveraging):
                callback.setup(lightning, task, "fit")  # copies the network, which fake tensors cannot
                _move(callback._average_model, fake)
                callback.setup = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
        _move(task, fake)
        task._device = GPU
        with fake, found, pytest.raises(_FinishedError):
            lightning.fit(task, images)
    return found


@contextmanager
def _pretend(batches: tuple[_Loaded, _Loaded], images: Any) -> Iterator[None]:
    """Let Lightning train on a GPU that does not exist, with batches that were loaded before."""
    make: Callable[..., L.Trainer] = L.Trainer
    flush = Votes.flush

    def forget_votes(votes: Votes) -> list[bool]:
        return [False for _ in flush(votes)]

    def make_trainer(accelerator: str, devices: object, num_nodes: int, plugins: object, **settings: Any) -> L.Trainer:
        return make(**settings | {"strategy": _Strategy(device=GPU, accelerator=_PretendedGPU())})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.L, "Trainer", make_trainer)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(Votes, "flush", forget_votes)
        patch.setattr(images, "train_dataloader", lambda: batches[0])
        patch.setattr(images, "val_dataloader", lambda: batches[1])
        sources._make_constant.cache_clear()
        yield
    sources._make_constant.cache_clear()


def _move(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all tensors of ``module`` by fake ones on the GPU."""

    def replace(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)

    with mode:
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = None if p is None else nn.Parameter(replace(p), p.requires_grad)
            for name, x in part._buffers.items():
                part._buffers[name] = None if x is None else replace(x)
            if isinstance(part, torchmetrics.Metric):
                for name, x in part._defaults.items():
                    part._defaults[name] = replace(x)
                    setattr(part, name, replace(x))
                part._device = GPU
