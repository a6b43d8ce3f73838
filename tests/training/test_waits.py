"""Neither a training nor a validation step waits for the GPU: Lightning runs both with fake tensors on one."""

import pytest

from device_waits import find_waits
from ecanet.recipes import ModelConfig, OptimizerConfig
from tiny_runs import TINY, add_tiny

SMALL = TINY.but(
    data=TINY.data.but(batch_size=8, flip=True), model=ModelConfig(name="resnet8"), epochs=1, channels_last=False
)
RECIPES = {
    "average of the weights, mixed images, class weights": SMALL.but(
        ema_decay=0.9, mixup=0.2, cutmix=0.3, label_smoothing=0.1, class_weights=(1, 2, 3)
    ),
    "AdamW, bfloat16, accumulated": SMALL.but(
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.01), precision="bf16-mixed", loss="bce", accumulate=2
    ),
}


@pytest.mark.parametrize("name", [next(iter(RECIPES)), pytest.param(list(RECIPES)[1], marks=pytest.mark.slow)])
def test_no_step_waits_for_the_gpu(name, tmp_path, monkeypatch):
    add_tiny(monkeypatch)
    waits = find_waits(RECIPES[name], tmp_path)
    for phase in ("training", "validation"):
        assert waits.count(phase) == []
    assert waits.count("")  # before the first batch Lightning compares the lengths of the loaders: it does count
