"""Ablations: the variants of a network, resuming after a kill, and the statistics, computed by hand."""

import functools
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ecanet import recipes
from ecanet.attention import ECA, ECANS, SE, SEGC, SEVar1, SEVar2, SEVar3
from ecanet.data import glyphs
from ecanet.errors import ConfigError
from ecanet.models import create_model
from ecanet.studies import ablate
from ecanet.studies.ablate import comparison, grid, pages
from ecanet.studies.ablate.figures import spread_labels
from ecanet.studies.ablate.variants import VARIANTS, NeutralECA, Variant, describe_form, plan
from ecanet.studies.cost import count
from tiny_runs import TINY, add_tiny

RECIPE = recipes.find("quickstart")
RECIPE = RECIPE.but(epochs=2, model=RECIPE.model.but(name="resnet8"), schedule=RECIPE.schedule.but(warmup_epochs=0.5))
NAMES = ["eca-k3", "se-var1"]


def test_the_whole_list_on_a_small_network():
    lines = []
    rows = {row.name: row for row in plan(RECIPE, VARIANTS, lines.append)}
    same = "is the same network as eca-k3 here: one row"
    assert lines == [f"eca-adaptive {same}", f"eca-random {same}"]  # without weights all gates begin at random
    assert rows["eca-k3"].same_as == ("eca-adaptive", "eca-random")
    assert len(rows) == len(VARIANTS) - 2
    assert next(iter(rows)) == "none"
    assert rows["se"].model.options == {"reduction": 4}  # 16 would leave one number of 16 channels
    assert rows["se-gc"].model.options == {"groups": 4}
    assert rows["larger"].model.name == "resnet14"
    assert [rows[name].label for name in ("none", "larger", "se")] == [
        "none (plain resnet8)",
        "larger (plain resnet14, control)",
        "se",
    ]
    plain, larger = rows["none"].cost, rows["larger"].cost
    assert larger.parameters > 2 * plain.parameters
    assert rows["eca-k9"].cost.parameters - plain.parameters == 3 * 9
    assert rows["eca-ns"].cost.parameters - plain.parameters == 3 * (16 + 32 + 64)


@pytest.mark.slow
def test_the_whole_list_on_a_large_network():
    recipe = RECIPE.but(model=RECIPE.model.but(name="resnet50"), data=RECIPE.data.but(image_size=32))
    rows = {row.name: row for row in plan(recipe, VARIANTS, lambda line: None)}
    assert len(rows) == len(VARIANTS) - 1  # k = 5, 5, 5, 7 is none of the fixed ones, and eca-random is eca-adaptive
    assert rows["se"].model.options == {"reduction": 16}
    assert rows["larger"].model.name == "resnet101"


def test_a_neutral_eca_begins_as_the_plain_network_and_trains():
    (plain, neutral) = plan(RECIPE, ["eca-neutral"], lambda line: None)
    assert neutral.cost.parameters == plain.cost.parameters + 3 * 3
    networks = [create_model(row.model.name, attention=row.model.attention, num_classes=3) for row in (plain, neutral)]
    networks[1].load_state_dict(networks[0].state_dict(), strict=False)
    images = torch.randn(2, 3, 16, 16)
    expected, found = (network(images) for network in networks)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    gates = [module for module in networks[1].modules() if isinstance(module, ECA)]
    assert len(gates) == 3
    assert all(gate.conv.weight.grad.abs().max() > 0 for gate in gates)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (NeutralECA(16, 1), ECA(16, 1), False),
        (NeutralECA(16, 1), NeutralECA(16, 1), True),
        (SEGC(16, groups=16), SEVar2(16), True),
        (SEGC(16, groups=1), SEVar3(16), True),
        (ECANS(16, 1), SEVar2(16), True),
        (ECA(32), ECA(32, 3), True),
        (ECA(32, 1, padding_mode="circular"), ECA(32, 1), True),
        (ECA(32, 3, padding_mode="circular"), ECA(32, 3), False),
        (ECA(32, 3), ECA(32, 5), False),
        (SEGC(16, groups=4), SEGC(16, groups=8), False),
        (SEVar1(16), SEVar2(16), False),
        (SE(16, 2), SE(16, 4), False),
        (SEVar2(16), SEVar2(32), False),
    ],
)
def test_which_gates_are_the_same(one, other, same):
    assert (describe_form(one) == describe_form(other)) is same


def cells(*rows: tuple[str, list[float]]) -> dict[tuple[str, int], dict[str, object]]:
    return {
        (name, seed): {"metrics": {"top1": v}, "seconds": 1.0} for name, values in rows for seed, v in enumerate(values)
    }


def variant(name: str) -> Variant:
    cost = count(SEVar2(4), (4, 2, 2))
    return Variant(name=name, recipe=RECIPE, cost=cost)


def test_means_and_intervals_by_hand():
    """Four seeds: t(0.975, 3) = 3.182446; paired differences 1, 2, 1, 2."""
    found = cells(("none", [90.0, 91.0, 92.0, 93.0]), ("eca", [91.0, 93.0, 93.0, 95.0]))
    none, eca = comparison.compare([variant("none"), variant("eca")], found, seeds=4)
    assert none.difference is None
    assert none.score.mean == 91.5
    assert none.score.half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert eca.difference is not None
    assert eca.difference.mean == 1.5
    assert eca.difference.half == pytest.approx(3.182446 * math.sqrt(1 / 3) / 2, rel=1e-6)
    assert eca.significant is True  # 1.5 +- 0.92, one comparison
    assert pages.format_estimate(eca.difference, "+") == "+1.50 (+0.58 to +2.42)"


def test_more_comparisons_need_a_larger_difference():
    """The same difference beside twenty others: t(1 - 0.025 / 21, 3) = 9.61 widens 0.92 to 2.8."""
    rows = [("none", [90.0, 91.0, 92.0, 93.0])] + [(f"v{i}", [91.0, 93.0, 93.0, 95.0]) for i in range(21)]
    lines = comparison.compare([variant(name) for name, _ in rows], cells(*rows), seeds=4)
    assert not any(line.significant for line in lines)
    assert all(line.difference is None or line.difference.low > 0 for line in lines)


def test_one_seed_has_no_interval_and_no_test():
    none, eca = comparison.compare([variant("none"), variant("eca")], cells(("none", [90.0]), ("eca", [91.0])), seeds=1)
    assert (none.score.half, eca.significant) == (None, None)
    done = grid.Ablation(recipe=RECIPE, folder=Path(), seeds=[0], results=[none, eca])
    assert "+1.00 |" in pages.to_markdown(done)
    assert "One seed" in pages.explain(done)


def test_labels_of_the_picture_do_not_overlap():
    values = [90.65, 90.38, 90.50, 90.63, 90.06, 90.13, 90.32, 90.79, 91.94]
    heights = spread_labels(values, gap=0.13)
    ordered = sorted(heights)
    assert all(b - a > 0.13 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert [heights.index(h) for h in ordered] == sorted(range(len(values)), key=lambda i: values[i])
    assert heights[-1] == 91.94  # far from the others: it stays at its point


def outcome(folder: Path) -> list[object]:
    """Everything in the result but the times."""
    content = json.loads((folder / "ablation.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in content["rows"]]


COMMAND = [
    sys.executable, "-m", "ecanet", "ablate", "quickstart", "--model", "resnet8", "--epochs", "2", "--seeds", "2",
    "--variants", "eca-k3,se-var1", "--threads", "1", "--out",
]  # fmt: skip


def kill_when(done: object, folder: Path) -> None:
    """Start the ablation, and kill it with SIGKILL as soon as ``done()`` is true."""
    with subprocess.Popen([*COMMAND, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not done():
            if process.poll() is not None:
                pytest.fail(f"the ablation ended by itself: {process.stderr.read().decode()[-500:]}")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_ablation_is_resumed(tmp_path):
    """One ablation is killed twice, between cells and within a cell; another one is not disturbed."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    first, second = folder / "cells" / "none-seed0.json", folder / "cells" / "none-seed1"
    kill_when(first.exists, folder)
    stamp = first.stat().st_mtime_ns
    kill_when((second / "checkpoints" / "last.ckpt").exists, folder)
    assert not second.with_suffix(".json").exists()
    for path in (folder, whole):
        subprocess.run([*COMMAND, str(path)], check=True, capture_output=True, timeout=240)
    assert outcome(folder) == outcome(whole)
    assert first.stat().st_mtime_ns == stamp  # a finished cell is never run again
    for name in ("ablation.md", "ablation.png", "ablation.html"):
        assert (folder / name).stat().st_size > 500
    page = (folder / "ablation.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert "src=" not in page  # one file


def test_ray_gives_the_same_table(tmp_path):
    ray = pytest.importorskip("ray")
    say = []
    pages.write(ablate.run(RECIPE, folder=tmp_path / "here", variants=NAMES, seeds=2, threads=1, say=say.append))
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        lines = []
        result = ablate.run(RECIPE, folder=tmp_path / "ray", variants=NAMES, seeds=2, on="ray", say=lines.append)
    finally:
        ray.shutdown()
    pages.write(result)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    ran = [line.split(":")[0] for line in lines if "top-1" in line]
    assert sorted(ran) == sorted(f"{name}-seed{seed}" for name in ("none", *NAMES) for seed in (0, 1))


def test_settings_reach_the_cells_and_a_folder_belongs_to_one_recipe(tmp_path, monkeypatch):
    add_tiny(monkeypatch)
    recipe = TINY.but(epochs=1)
    result = ablate.run(recipe, folder=tmp_path, variants=["se"], seeds=2, say=lambda line: None)
    seeds = [json.loads(path.read_text())["recipe"]["seed"] for path in sorted(tmp_path.glob("cells/se-seed*.json"))]
    assert seeds == [0, 1]
    cell = json.loads((tmp_path / "cells" / "se-seed0.json").read_text())
    assert cell["recipe"]["model"] == {
        "name": "resnet8", "attention": "se", "kernel_sizes": "adaptive", "where": None, "replace": None,
        "preserve": None, "weights": None, "options": {"reduction": 4},
    }  # fmt: skip
    assert cell["parameters"] == result.results[1].variant.cost.parameters
    assert cell["metrics"]["top1"] == result.results[1].by_seed[0]
    assert (tmp_path / "cells" / "se-seed0" / "metrics.csv").exists()  # each cell keeps its log
    with pytest.raises(ConfigError, match="another recipe"):
        ablate.run(recipe.but(epochs=3), folder=tmp_path, variants=["se"], seeds=1)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no variant 'eca-k33'; did you mean 'eca-k3'"):
        ablate.run(RECIPE, folder=tmp_path, variants=["eca-k33"], seeds=1)
    with pytest.raises(ConfigError, match="seeds must be a positive integer"):
        ablate.run(RECIPE, folder=tmp_path, seeds=0)
    with pytest.raises(ConfigError, match="cannot run on 'slurm'"):
        ablate.run(RECIPE, folder=tmp_path, variants=[], seeds=1, on="slurm", say=lambda line: None)
    with pytest.raises(ConfigError, match="no larger network"):
        plan(RECIPE.but(model=RECIPE.model.but(name="mobilenet_v2")), ["larger"])
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
@pytest.mark.parametrize("left", ["everything but the cell's file", "no checkpoint yet", "an empty folder"])
def test_an_interrupted_cell_is_resumed(left, tmp_path):
    """The states in which a kill can leave a cell, apart from the one in the test with a real kill."""
    quiet = {"folder": tmp_path, "variants": ["se-var1"], "seeds": 1, "threads": 1, "say": lambda line: None}
    expected = [line.by_seed for line in ablate.run(RECIPE, **quiet).results]
    run_dir = tmp_path / "cells" / "se-var1-seed0"
    run_dir.with_suffix(".json").unlink()
    if left != "everything but the cell's file":
        kept = (run_dir / "recipe.json").read_bytes()
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        if left == "no checkpoint yet":
            (run_dir / "recipe.json").write_bytes(kept)
    assert [line.by_seed for line in ablate.run(RECIPE, **quiet).results] == expected


def test_a_recipe_with_a_seed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leave out seed=7"):
        ablate.run(recipes.find("digits").but(seed=7), folder=tmp_path)


def test_a_merged_row_has_the_same_name_in_any_order_of_the_list():
    recipe = recipes.find("digits").but(model=recipes.find("digits").model.but(name="resnet8"))
    names = [
        [row.name for row in plan(recipe, order, lambda line: None)]
        for order in (["eca-k3", " eca-adaptive"], ["eca-adaptive", "eca-k3"])
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 2


@pytest.mark.slow
def test_the_published_ablation_of_glyphs_in_a_small_form(ecanet, monkeypatch):
    """The command of docs/results.md, with 90 images for training and one epoch."""
    monkeypatch.setattr(glyphs, "GlyphConfig", functools.partial(glyphs.GlyphConfig, train=90, held_out=45))
    arms = ["--variants", "eca-adaptive,eca-neutral,se,gct,srm,simam", "--seeds", 2, "--threads", 1]
    code, out, err = ecanet("ablate", "glyphs", *arms, "--epochs", 1, "--data-dir", "made", "--out", "arms")
    assert code == 0, err
    for name in ("none (plain resnet20)", "eca-adaptive", "eca-neutral", "se", "gct", "srm", "simam"):
        assert f"| {name} |" in out
    assert len(json.loads(Path("arms/ablation.json").read_text())["rows"]) == 7
