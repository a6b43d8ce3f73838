"""The scripts in `benchmarks` still fit the library: each runs in a small form, or its names are compared."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ecanet

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_kernels_that_are_compiled_ahead_of_time_have_the_named_arguments():
    pytest.importorskip("triton")
    kernels = list(load("compile_kernels").list_kernels())
    assert [kernel.find_unknown_names() for kernel in kernels] == [set()] * len(kernels)
    rows = json.loads((SCRIPTS / "results" / "kernels-sm90.json").read_text())["kernels"]
    assert [kernel.name for kernel in kernels] == [row["kernel"] for row in rows]
    for kernel in kernels:
        given = {f"{name}_ptr" for name in kernel.tensors} | set(kernel.constants)
        # a pointer without a tensor is None, but every flag and size must be given
        assert {name for name in kernel.function.arg_names if name.isupper()} <= given, kernel.name


def test_fine_tuning_after_attach_runs_in_a_small_form(monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    script = load("attach_finetune")
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(script, "load_fashion_mnist", lambda root, train: (images, torch.arange(64) % 10))
    for name in ("RESULTS", "PICTURE", "TABLE", "CHECKPOINTS"):
        monkeypatch.setattr(script, name, tmp_path / name.lower())
    small = {"images": 32, "epochs": 1, "learning_rate": 0.01, "learning_rates": [0.01]}
    settings = script.SETTINGS | {"network": "resnet8", "seeds": [0], "batch_size": 8}
    monkeypatch.setattr(
        script, "SETTINGS", settings | {"pretrain": small, "finetune": small, "recalibrate": {"images": 16}}
    )
    monkeypatch.setattr(sys, "argv", ["attach_finetune.py"])
    script.main()
    cells = json.loads((tmp_path / "results").read_text())["cells"]
    assert [cell["arm"] for cell in cells] == ["plain", "eca", "eca-random", "eca-random-recalibrated", "se"]
    inserted, recalibrated = cells[2:4]
    assert inserted["points"][0] != recalibrated["points"][0]
    assert inserted["last_losses"] == recalibrated["last_losses"]  # training does not use the statistics
    unchanged = {cell["arm"]: cell["outputs_unchanged_by_attach"] for cell in cells}
    assert unchanged == {"plain": True, "eca": True, "eca-random": False, "eca-random-recalibrated": False, "se": True}
    assert [point["step"] for point in cells[0]["points"]] == [0, 1, 2, 4]
    before = (tmp_path / "results").read_bytes()
    script.main()  # every cell is done
    assert (tmp_path / "results").read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["attach_finetune.py", "--plot"])
    script.main()
    rows = (tmp_path / "table").read_text().splitlines()
    assert [row.split(" | ")[:4] for row in rows[2:]] == [
        ["| 0.01", cell["arm"], str(cell["added_parameters"]), "1"] for cell in cells
    ]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_scenes_lists_finished_runs_without_training(monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    script = load("scenes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "RESULT", tmp_path / "scenes.json")
    monkeypatch.setattr(script.training, "run", lambda *args, **options: pytest.fail("it trained"))
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--missing", "skip"])
    script.main()
    result = json.loads((tmp_path / "scenes.json").read_text())
    assert result["runs"] == []
    assert result["recipe"]["data"]["name"] == "scenes"


def test_readers_of_images_take_turns(monkeypatch, tmp_path):
    script = load("input")
    monkeypatch.setattr(script, "BATCH", 8)
    out = tmp_path / "input.json"
    monkeypatch.setattr(sys, "argv", ["input.py", "--images", "32", "--rounds", "2", "--out", str(out)])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    rows = {row["reader"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows[script.BASE]["ratio"] == 1
    assert {"ecanet folder", "ecanet shards", "ecanet shards, packed at 256 pixels"} < set(rows)
    assert all(row["images per second"] > 0 for row in rows.values())


def test_times_of_slim_are_ratios_within_a_round():
    pytest.importorskip("onnxruntime")
    row = load("slim").summarize("resnet20", "eca", [0.002, 0.009, 0.004], [0.001, 0.003, 0.004])
    assert (row["ratio"], row["quartiles"], row["ms"], row["ratio of the fastest"]) == (2, [1, 3], 4, 2)


@pytest.mark.slow
def test_folded_networks_are_timed_beside_plain_ones(tmp_path):
    pytest.importorskip("onnxruntime")
    load("slim").main(["--networks", "resnet20", "--seconds", "0", "--out", str(tmp_path / "slim.json")])
    rows = json.loads((tmp_path / "slim.json").read_text())["times"]
    assert [row["gates"] for row in rows] == ["none", "eca", "eca, folded", "se", "se, folded"]


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Make the script measure networks with random weights, in ONNX Runtime, as if runs had trained them."""
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(SCRIPTS)
    script = load("deploy_trained")
    monkeypatch.setattr(script, "RUNTIMES", {"onnx": "ONNX Runtime"})
    monkeypatch.setattr(script, "CALIBRATION", 8)
    (tmp_path / "eca" / "slim").mkdir(parents=True)
    (tmp_path / "eca" / "slim" / "slim.pth").touch()

    def restore(path: Path):
        attention = {"plain": "none"}.get(path.name, "eca")
        recipe = ecanet.recipes.find("quickstart")
        torch.manual_seed(0)
        model = ecanet.create_model("resnet8", attention=attention, num_classes=10, in_channels=1).eval()
        gates = [one for one in model.modules() if isinstance(one, ecanet.ECA)]
        for gate in gates[: 1 if path.name == "slim.pth" else 3]:
            torch.nn.init.normal_(gate.conv.weight)
        for gate in gates[1:] if path.name == "slim.pth" else []:
            torch.nn.init.zeros_(gate.conv.weight)
            gate.gain = 2.0
        return SimpleNamespace(model=model, recipe=recipe.but(model=recipe.model.but(attention=attention)), split=None)

    monkeypatch.setattr(script.training, "restore", restore)
    return script


def test_trained_networks_come_with_timms_gates_and_without_neutral_ones(trained, tmp_path):
    networks = dict(trained.list_networks([tmp_path / "plain", tmp_path / "eca"]))
    count = {name: sum(isinstance(one, ecanet.ECA) for one in network.modules()) for name, network in networks.items()}
    assert count == {"plain": 0, "eca": 3, "timm's eca": 0, "eca, slim": 1}  # two gates of the file are neutral
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(networks["timm's eca"](x), networks["eca"](x))
    whole = trained.training.restore(tmp_path / "eca" / "slim" / "slim.pth").model
    torch.testing.assert_close(networks["eca, slim"](x), whole(x), rtol=0, atol=0)


@pytest.mark.slow
def test_trained_networks_are_measured_side_by_side(trained, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    folders = [str(tmp_path / name) for name in ("plain", "eca")]
    given = [*folders, "--images", "20", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["deploy_trained.py", *given])
    threads = torch.get_num_threads()
    try:
        assert trained.main() == 0
    finally:
        torch.set_num_threads(threads)
    rows = {(row["runtime"], row["variant"], row["batch"]): row for row in json.loads(out.read_text())["rows"]}
    networks = ["plain", "eca", "timm's eca", "eca, slim"]
    assert {key[1] for key in rows} == {*networks, *(f"{name}, int8" for name in networks)}
    plain = rows["onnx", "plain", 1]
    assert rows["onnx", "plain", 8]["ratio"] == 1
    assert rows["onnx", "eca, int8", 1]["bytes"] < rows["onnx", "eca", 1]["bytes"]
    assert plain["top1"] == rows["eager", "plain", 8]["top1"]
    assert f"| ONNX Runtime | plain | {plain['bytes'] / 1e6:.2f} | {plain['top1']:.2f} |" in capsys.readouterr().out


def test_trained_networks_need_the_plain_one_first(trained, tmp_path):
    with pytest.raises(SystemExit, match="has attention; the first run is the plain network"):
        trained.measure([tmp_path / "eca"], 8, 1)
