"""`ecanet export`: what it prints for people, for networks by name and for a run's network in int8."""

import json

import pytest

from ecanet.cli.deploy import ENDINGS, name_file, show
from ecanet.deploy import TARGETS, Int8Report

LINE = ["export", "resnet8", "--to", "torchscript", "--no-check", "--image-size", 32]


@pytest.mark.parametrize("attention", ["eca", "none"])
def test_the_report_is_a_table(ecanet, tmp_path, attention):
    code, out, err = ecanet(*LINE, "--attention", attention)
    assert code == 0, err
    assert (tmp_path / "resnet8.pt").exists()
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in out.splitlines() if row.startswith("│")]
    assert ["file", "resnet8.pt"] in rows
    assert ["target", "torchscript"] in rows


def test_json_is_alone_on_standard_output(ecanet):
    code, out, err = ecanet(*LINE, "--json")
    assert code == 0, err
    assert json.loads(out)["target"] == "torchscript"
    assert "random weights" in err


def test_an_example_larger_than_memory_is_one_line(ecanet, tmp_path):
    code, out, err = ecanet(*LINE[:-1], 10_000_000)
    assert (code, out) == (2, "")
    assert "no memory for an example of 1x3x10000000x10000000; give a smaller --image-size" in " ".join(err.split())
    assert not (tmp_path / "resnet8.pt").exists()


def test_the_names_of_int8_rows_are_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers = {"layer1.0.attention.layers.conv": 0.037}
    fields = {
        "path": "net.onnx",
        "target": "onnx",
        "bytes": 1,
        "gates": {"conv2d": 9},
        "calibration": 512,
        "images": 360,
    }
    show(Int8Report(agreement=100.0, before=90.0, after=89.5, layers=layers, **fields), as_json=False)
    out = capsys.readouterr().out
    assert "error of layer1.0.attention.layers.conv │ 3.7%" in out
    assert "(-0.50)" in out


@pytest.mark.parametrize("more", [[], ["--out", "link.pt"], ["--out", "weights.pt", "--int8", "--to", "onnx"]])
def test_a_checkpoint_is_never_replaced_by_its_own_file(ecanet, tmp_path, more):
    (tmp_path / "weights.pt").write_bytes(b"trained for a week")
    (tmp_path / "link.pt").symlink_to("weights.pt")
    code, out, err = ecanet("export", "weights.pt", "--to", "torchscript", *more)
    assert (code, out) == (2, "")
    assert "is the checkpoint itself; give another name by --out" in err
    assert (tmp_path / "weights.pt").read_bytes() == b"trained for a week"


def test_each_target_has_a_name_of_its_own_for_its_file(tmp_path):
    """Two targets write .onnx, and neither replaces the other's file beside a run."""
    assert list(ENDINGS) == list(TARGETS)
    assert all(ending.endswith(TARGETS[name].suffix) for name, ending in ENDINGS.items())
    assert len(set(ENDINGS.values())) == len(ENDINGS)
    (tmp_path / "best.ckpt").touch()
    ending = ENDINGS["onnxruntime"]
    assert name_file(str(tmp_path), ending) == tmp_path / "model-onnxruntime.onnx"
    assert name_file(str(tmp_path / "best.ckpt"), ending) == tmp_path / "best-onnxruntime.onnx"
    assert str(name_file("timm:resnet18", ending)) == "resnet18-onnxruntime.onnx"


@pytest.mark.parametrize("target", ["onnxruntime", "torchscript"])
def test_a_target_without_int8_is_one_line_that_names_those_with_it(ecanet, target):
    code, out, err = ecanet("export", "resnet8", "--to", target, "--int8", "--images", "fashion")
    assert (code, out) == (2, "")
    line = f"there is no int8 for {target}; give --to onnx or --to openvino or --to executorch"
    assert line in " ".join(err.split())
