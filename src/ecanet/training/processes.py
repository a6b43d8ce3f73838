"""The processes of a run that torchrun has started again after one of them was lost."""

import os
from typing import Any, cast

import lightning as L
import torch

__all__ = ["join_restarted"]


def join_restarted(trainer: L.Trainer) -> None:
    """Connect the processes, if torchrun has started them again; Lightning finds them connected.

    They meet at a store that the launcher keeps over its attempts, and PyTorch (2.11 to 2.15) does not separate these:
    a process may find the address of one that was lost, and wait for it for ever. So each attempt gets its own names.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # Where the launcher keeps no store, PyTorch's first process makes a new one at each attempt.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == 0 or not kept or trainer.world_size == 1 or torch.distributed.is_initialized():
        return
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    c10d = cast(Any, torch.distributed)  # its stores have no types
    store = c10d.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), trainer.world_size, is_master=False
    )
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=c10d.PrefixStore(f"attempt-{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=trainer.world_size,
    )
