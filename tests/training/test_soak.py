"""Three thousand steps: memory and open files stay what they were after the first thousand."""

import os
from pathlib import Path

import lightning as L
import pytest

from bounds import read_memory
from ecanet import training
from ecanet.recipes import DataConfig, ModelConfig, OptimizerConfig, Recipe
from photographs import make_flat

STEPS = 3000


class Watch(L.Callback):
    """Note the process's memory and open files at every hundredth step."""

    def __init__(self):
        self.rows: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step % 100 == 0 and (not self.rows or self.rows[-1][0] != trainer.global_step):
            handles = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            self.rows.append((trainer.global_step, read_memory("VmRSS"), handles))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists a process's open files")
@pytest.mark.parametrize(
    ("kind", "steps"),
    [pytest.param("digits", STEPS, marks=pytest.mark.soak), pytest.param("folder", STEPS, marks=pytest.mark.soak)],
)
def test_memory_and_open_files_stay_flat(tmp_path, kind, steps):
    """`digits` in memory, with an average of the weights; a folder by two workers: both with logs and checkpoints."""
    if kind == "digits":
        data, per_epoch = DataConfig(name="digits", batch_size=16, crop_padding=1), 89
    else:
        photos = make_flat(tmp_path / "photos", {"ant": 60, "bee": 60})
        data, per_epoch = DataConfig(name=f"folder:{photos}", image_size=16, batch_size=2, workers=2), 48
    recipe = Recipe(
        data=data,
        model=ModelConfig(name="resnet8"),
        optimizer=OptimizerConfig(learning_rate=0.01, base_batch=16),
        epochs=-(-steps // per_epoch),
        ema_decay=0.9 if kind == "digits" else None,
    )
    watch = Watch()
    training.run(
        recipe, folder=tmp_path / "run", device="cpu", quiet=True, loggers="csv,tensorboard", callbacks=[watch]
    )
    settled = [row for row in watch.rows if row[0] >= 1000]
    first, last = settled[0], settled[-1]
    print(
        f"\n{kind}: step {first[0]}: {first[1] / 1e6:.0f} MB, {first[2]} open files; "
        f"step {last[0]}: {last[1] / 1e6:.0f} MB, {last[2]} open files"
    )
    assert last[0] >= steps - 100
    assert last[1] < first[1] + 30e6
    assert {row[2] for row in settled} <= set(range(first[2] - 2, first[2] + 3))
