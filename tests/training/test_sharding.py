"""Runs that share the weights among their processes (FSDP2) equal all others, and write the same files."""

import copy
import os
from typing import Any

import lightning as L
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import ecanet
from ecanet.errors import ConfigError
from ecanet.recipes import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, Recipe
from ecanet.training.sharding import _find_parts, check_sharding, gather, release, shard
from tiny_runs import TINY, add_tiny, check_close, check_states, run


class StopError(Exception):
    """An interruption."""


class Stop(L.Callback):
    """Interrupts a run in its second epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):
            raise StopError


@pytest.fixture
def group(monkeypatch):
    """Run with one process, whose group ends with the test."""
    add_tiny(monkeypatch)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerConfig(name="adamw", learning_rate=0.002, base_batch=16, decay_norms=False)},
        pytest.param({"accumulate": 2}, marks=pytest.mark.slow),
    ],
    ids=["adamw", "sgd"],
)
def test_a_sharded_run_in_pieces_equals_a_plain_one(tmp_path, group, changes):
    recipe = TINY.but(model=ModelConfig(name="resnet8"), epochs=2, checkpoint=CheckpointConfig(steps=1), **changes)
    plain = run(recipe, tmp_path / "plain")
    sharded = recipe.but(strategy="fsdp")
    with pytest.raises(StopError):
        run(sharded, tmp_path / "sharded", callbacks=[Stop()])
    report = run(sharded, tmp_path / "sharded", resume=True)
    check_close(tmp_path / "sharded", tmp_path / "plain")
    check_states(report.last_checkpoint, plain.last_checkpoint)
    means, expected = ([gate["mean"] for gate in one.artifacts["gates"]] for one in (report, plain))
    assert means
    assert means == [pytest.approx(mean, rel=1e-3) for mean in expected]


@pytest.mark.slow
def test_sharded_steps_are_those_of_ddp_in_float64(tmp_path):
    """Also with an evaluation between them, for which every process gets all weights."""
    torch.multiprocessing.spawn(check_steps, (str(tmp_path / "store"),), nprocs=2)


def check_steps(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = ecanet.create_model("resnet20", num_classes=3, in_channels=1).double()
    sharded = copy.deepcopy(plain)
    shard(sharded, init_device_mesh("cpu", (2,)), sync_batchnorm=False)
    together = nn.parallel.DistributedDataParallel(plain)
    pairs = [(one, torch.optim.SGD(one.parameters(), 0.02, momentum=0.9)) for one in (together, sharded)]
    noise = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randn(8, 1, 8, 8, generator=noise, dtype=torch.float64) + rank
        for model, optimizer in pairs:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(images), torch.arange(8) % 3).backward()
            optimizer.step()
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.allclose(a, b.full_tensor(), rtol=0, atol=1e-14)
        gather(sharded)
        with torch.inference_mode():
            expected, found = plain.eval()(images), sharded.eval()(images)
            for _ in range(rank):  # without waiting for the other process
                sharded(images)
        if rank == 0:  # whose statistics all get
            assert torch.allclose(expected, found, rtol=0, atol=1e-12)
        release(sharded)
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("ema_decay", {"ema_decay": 0.9}),
        ("compile=true", {"compile": True}),
        ("cuda_graph=true", {"cuda_graph": True}),
        ("precision=16-mixed", {"precision": "16-mixed"}),
        ("on_nan=skip", {"on_nan": "skip"}),
        ("data.on_corrupt=skip", {"data": DataConfig(on_corrupt="skip")}),
        ("task=detection", {"task": "detection"}),
    ],
)
def test_what_sharding_cannot_do_is_refused(setting, changes):
    with pytest.raises(ConfigError, match=f"strategy=fsdp cannot be combined with {setting}; leave one of them out"):
        check_sharding(Recipe(strategy="fsdp", **changes))


def test_blocks_are_gathered_together():
    def block(*inner: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 1, 1), *inner)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block(nn.ReLU())

    stages: Any = nn.Sequential(nn.Sequential(Block(), Block()), nn.ModuleList([Block(), nn.ReLU()]))
    assert list(_find_parts(stages)) == [stages[0][0], stages[0][1], stages[1][0]]
