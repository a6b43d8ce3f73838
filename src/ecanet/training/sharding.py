"""Share a network's weights, gradients and optimizer state among the processes of a run: ``strategy=fsdp``.

It is PyTorch's FSDP2 (``fully_shard``). Checkpoints are those of every other run: `torch.distributed.checkpoint`
gathers the weights in the first process, which writes one file.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ecanet.errors import ConfigError
from ecanet.recipes import Recipe

__all__ = ["ShardedStrategy", "check_sharding", "gather", "release", "shard"]


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints in the form of all other runs."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return that `load_optimizer_state_dict` restores the optimizer."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes: all of them share the weights, on all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of ``optimizer`` as it is without shards; beside the first process, without numbers."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        whole: dict[str, Any] = inner.state_dict()
        return {**whole, "state": _map_tensors(whole["state"], self._gather)}

    def _gather(self, _: object, value: Tensor) -> Tensor:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.cpu() if self.is_global_zero else torch.empty(0)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of the file, in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each process its share of the weights."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its share of the optimizer's tensors."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in cast("list[nn.Parameter]", group["params"])]

            def share(index: int, value: Tensor, parameters: list[nn.Parameter] = parameters) -> Tensor:
                like = parameters[index]
                if not isinstance(like, DTensor) or value.shape != like.shape:  # AdamW's step is one number
                    return value
                return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

            optimizer.load_state_dict({**whole, "state": _map_tensors(whole["state"], share)})


def _map_tensors(
    states: Mapping[int, Mapping[str, Tensor]], function: Callable[[int, Tensor], Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Return the states of the parameters with ``function`` applied to their tensors, in one order in all processes."""
    return {index: {name: function(index, state[name]) for name in sorted(state)} for index, state in states.items()}


def shard(model: nn.Module, mesh: DeviceMesh, *, sync_batchnorm: bool) -> None:
    """Share the parameters of ``model`` among the processes of ``mesh``, if they are not shared yet.

    What is gathered together are the entries of its containers, such as the blocks of a ResNet, and the rest.
    """
    if isinstance(model, FSDPModule):
        return
    if sync_batchnorm:  # Lightning does it for DDP alone
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # pyright: ignore[reportUnknownMemberType]
    model.to(memory_format=torch.contiguous_format)  # FSDP2 refuses parameters in channels_last
    for part in _find_parts(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _find_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost entries of containers that have modules of their own."""
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(
            child, nn.Sequential | nn.ModuleList
        )
        if listed and next(child.children(), None) is not None:
            yield child
        else:
            yield from _find_parts(child)


def gather(model: nn.Module) -> None:
    """Give every process all parameters until `release`, and the first one's buffers.

    Processes evaluate different numbers of batches, so none may wait for another one in the middle of it. All processes
    must call this together. A network that is not sharded is left as it is.
    """
    parts = _list_parts(model)
    # What is gathered in inference mode could not be used outside it.
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    if parts:
        for value in model.buffers():
            torch.distributed.broadcast(value, 0)


def release(model: nn.Module) -> None:
    """Undo `gather`: each process keeps its share alone."""
    for part in _list_parts(model):
        part.set_reshard_after_forward(cast(object, part) is not model, recurse=False)
        part.reshard()


def _list_parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_sharding(recipe: Recipe) -> None:
    """Check that ``recipe`` has no setting that ``strategy=fsdp`` cannot do yet.

    Raises:
        ConfigError: it has one.
    """
    refused = {
        "task=detection": recipe.task == "detection",
        "ema_decay": recipe.ema_decay is not None,
        "compile=true": recipe.compile,
        "cuda_graph=true": recipe.cuda_graph,
        "precision=16-mixed": recipe.precision == "16-mixed",
        "on_nan=skip": recipe.on_nan == "skip",
        "data.on_corrupt=skip": recipe.data.on_corrupt == "skip",
    }
    found = next((name for name, has in refused.items() if has), None)
    if found is not None:
        raise ConfigError(f"strategy=fsdp cannot be combined with {found}; leave one of them out (strategy=ddp has it)")
