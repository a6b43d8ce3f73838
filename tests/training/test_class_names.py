"""Classes may have names of any bytes: nothing fails on them after hours of training."""

import os

import pytest
from PIL import Image

from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.training import restore, run

NAMES = {
    "$5_to_10_$": "$5_to_10_$",
    r"a$\frac$": r"a$\frac$",
    "x" * 255: "x" * 255,
    os.fsdecode(b"caf\xe9"): r"caf\xe9",
    "two\nlines": r"two\nlines",
    "<b>&": "<b>&",
}


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_a_run_with_class_names_of_any_bytes_writes_its_report(tmp_path, parts):
    for part in parts:
        for name in NAMES:
            try:
                (tmp_path / "photos" / part / name).mkdir(parents=True)
            except OSError as error:  # some file systems take no such bytes
                pytest.skip(str(error))
            for at in range(2):
                Image.new("RGB", (20, 20), (at * 50, 10, 10)).save(tmp_path / "photos" / part / name / f"{at}.png")
    data = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=16, batch_size=4, workers=0)
    recipe = Recipe(data=data, model=ModelConfig(name="resnet8"), epochs=1)
    report = run(recipe, folder=tmp_path / "run", device="cpu", quiet=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert set(report.artifacts["class_names"]) == set(NAMES.values())
    assert all(len(file.name) < 50 for file in (tmp_path / "run" / "examples").iterdir())
    assert set(restore(tmp_path / "run").spec.class_names) == set(NAMES.values())
