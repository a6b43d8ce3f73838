"""`benchmarks/pretrained.py`: its figures on ImageNet's weights where these are there, and a small form without them.

The default run downloads nothing. `python benchmarks/pretrained.py` or the slow test fetches the files.
"""

import importlib.util
import io
import itertools
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import matplotlib
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image

from ecanet.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pretrained", "drawing", "finetuning", "pictures", "packages")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("pretrained", ROOT / "benchmarks" / "pretrained.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in PARTS:
        sys.modules.pop(name, None)


def keep(monkeypatch, module, arms):
    monkeypatch.setattr(module, "ARMS", {arm: module.ARMS[arm] for arm in arms})


def check_pictures(script, files):
    """Plain 18 of 20; lossless the same, bit for bit; random gates 0."""
    for row in script.pictures.run(files, seeds=1):
        found = row["top1"], row["top5"], row["of"], row["bit_equal"]
        assert found == ((0, 0, 20, False) if row["arm"].endswith("-random") else (18, 20, 20, True)), row["arm"]


def test_nothing_changes_on_insertion_into_imagenet_weights(script, monkeypatch):
    """ECA alone, which is quick; the slow test has all arms."""
    keep(monkeypatch, script.pictures, ["plain", "eca", "eca-random"])
    try:
        files = script.packages.fetch(download=False, photographs=False)
    except DataError as error:
        pytest.skip(str(error))
    check_pictures(script, files)


@pytest.mark.slow
def test_the_files_can_be_fetched(script, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        files = script.packages.fetch(photographs=False)
    except DataError as error:
        pytest.skip(str(error))
    check_pictures(script, files)


def test_the_published_figures_are_those_of_the_readme():
    rows = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())["pictures"]
    right = {}
    for row in rows:
        right.setdefault((row["arm"].endswith("-random"), row["recalibrated"]), set()).add(row["top1"])
    assert right == {(False, False): {18}, (False, True): {18}, (True, False): {0}, (True, True): {17, 18, 19}}
    assert all(row["bit_equal"] != row["arm"].endswith("-random") for row in rows if not row["recalibrated"])
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text()
        assert "docs/pretrained.png" in text
        assert "17 to 19" in text or "17 到 19" in text


def make_stand_ins(folder, packages):
    """Return files of the right form: random weights, and noise for pictures."""
    torch.manual_seed(0)
    weights = folder / "weights.pth"
    torch.save(torchvision.models.mobilenet_v2().state_dict(), weights)
    paths = []
    for name in ("imagenet_00_7", "imagenet_01_8", "photograph"):
        pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
        paths.append(folder / f"{name}.png")
        Image.fromarray(pixels).save(paths[-1])
    return packages.Files(weights=weights, pictures=paths[:2], photographs=paths[2:])


def test_the_small_form_runs_on_stand_ins(script, monkeypatch, tmp_path, capsys):
    files = make_stand_ins(tmp_path, script.packages)
    keep(monkeypatch, script.finetuning, ["plain", "eca", "eca-gates-x10", "eca-random-recalibrated"])
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(script.packages, "fetch", lambda **options: files)
    monkeypatch.setattr(script.finetuning, "load_fashion_mnist", lambda root, train: (images, torch.arange(64) % 10))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "--quick", "--out", str(out), "--part", "finetuning"])
    assert script.main() == 0
    found = json.loads((out / "pretrained.json").read_text())
    cells = {cell["arm"]: cell for cell in found["finetuning"]}
    assert list(cells) == list(script.finetuning.ARMS)
    unchanged = {arm for arm, cell in cells.items() if cell["outputs_unchanged_by_attach"]}
    assert unchanged == {"plain", "eca", "eca-gates-x10"}
    assert all(gate["mean_distance"] > 0.2 for gate in cells["eca-random-recalibrated"]["gates"])
    moved = [max(g["largest_parameter"] for g in cells[arm]["gates"]) for arm in ("eca", "eca-gates-x10")]
    assert 0 < 3 * moved[0] < moved[1]
    assert [point["step"] for point in cells["plain"]["points"]] == [0, 1, 3]
    for name in ("pretrained-finetune.png", "pretrained-gates.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for path in out.glob("cell-*.json"):
        path.unlink()
    assert script.main() == 0  # the JSON file has every cell
    assert capsys.readouterr().out == ""
    assert json.loads((out / "pretrained.json").read_text())["finetuning"] == found["finetuning"]
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "--quick"])
    with pytest.raises(SystemExit):
        script.main()


def make_cells(rates, arms, gates):
    """Return made-up cells of two seeds: gate i of an arm is farther from 1 the larger i and the arm's factor are."""
    factors = {"eca": 1, "eca-gates-x10": 10, "eca-gates-x50": 50, "plain": 0}
    return [
        {
            "seed": seed,
            "arm": arm,
            "rate": rate,
            "gates": [
                {
                    "name": f"features.{i + 1}.conv.4",
                    "largest_distance": factors[arm] * rate * 0.011 * (i + 1 + 0.2 * seed),
                    "deviation": factors[arm] * rate * 0.002 * (i + 1),
                }
                for i in range(gates if factors[arm] else 0)
            ],
        }
        for rate, arm, seed in itertools.product(rates, arms, (-1, 1))
    ]


@pytest.mark.parametrize(
    ("rates", "arms", "titles"),
    [
        (
            (0.1, 1.0),
            ("plain", "eca", "eca-gates-x10", "eca-gates-x50"),
            [
                "learning rate 0.1, 2 seeds: of 17 gates moved 0 at × 1, 16 at × 10, 17 at × 50",
                "learning rate 1, 2 seeds: of 17 gates moved 16 at × 1, 17 at × 10, 17 at × 50",
            ],
        ),
        ((0.01,), ("eca", "eca-gates-x50"), ["learning rate 0.01, 2 seeds: of 17 gates moved 0 at × 1, 14 at × 50"]),
    ],
)
def test_the_picture_says_which_gates_moved(script, monkeypatch, tmp_path, rates, arms, titles):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    with matplotlib.rc_context({"font.size": 15}):
        script.drawing.draw_gates(make_cells(rates, arms, 17), tmp_path / "gates.png")
        (figure,) = figures
        figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes, title in zip(figure.axes, titles, strict=True):
        markers = [line for line in axes.lines if line.get_marker() != "None"]
        assert len(markers) == 17 * (len(arms) - ("plain" in arms))
        filled = [line for line in markers if line.get_markerfacecolor() != "white"]
        assert len(filled) == sum(int(n) for n in re.findall(r"(\d+) at ×", title))
        assert min(line.get_ydata()[0] for line in filled) >= 0.02
        assert all(line.get_ydata()[0] < 0.02 for line in set(markers) - set(filled))
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == [str(i) for i in range(1, 18)]
    check_texts(figure)


def check_texts(figure):
    """No text leaves the figure or touches another one."""
    lower = figure.axes[-1]
    texts = [axes.title for axes in figure.axes] + [lower.xaxis.label, *lower.get_xticklabels()]
    texts += figure.legends[0].get_texts() + figure.texts + [figure._supylabel]
    boxes = [(text.get_text(), text.get_window_extent()) for text in dict.fromkeys(texts)]
    assert len(boxes) > 25
    for name, box in boxes:
        assert figure.bbox.x0 <= box.x0, name
        assert box.x1 <= figure.bbox.x1, name
    for (name, box), (other, beside) in itertools.combinations(boxes, 2):
        assert not box.overlaps(beside), (name, other)


def test_there_is_no_picture_of_gates_without_gates(script, tmp_path):
    script.drawing.draw_gates(make_cells((0.01,), ("plain",), 17), tmp_path / "gates.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("from_debian", [False, True])
def test_a_package_of_other_bytes_is_not_used(script, monkeypatch, tmp_path, from_debian):
    """Only the kept files of exactly the named archive come into the cache."""
    packages = script.packages
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archive = io.BytesIO()
    if from_debian:
        monkeypatch.setattr(packages, "_read_deb", read_tar)
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in ("kept/a.txt", "other/b.txt"):
                tar.addfile(tarfile.TarInfo(name))
    else:
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr("kept/a.txt", b"")
            wheel.writestr("other/b.txt", b"")

    def download(command, *, cwd, **options):
        assert command[-1].startswith("thing=")
        (cwd / "thing").write_bytes(archive.getvalue())
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    made = {"name": "thing", "version": "1", "kept": ("kept/",), "from_debian": from_debian}
    with pytest.raises(DataError, match="it is not used"):
        packages._get(packages.Package(**made, sha256="0" * 64), True)
    right = packages.Package(**made, sha256=packages._hash(archive.getvalue()))
    with pytest.raises(DataError, match=r"thing 1 is not in .*; run benchmarks/pretrained\.py"):
        packages._get(right, False)
    assert [path.name for path in packages._get(right, True)] == ["a.txt"]
    assert packages._get(right, False) == packages._get(right, True)


def read_tar(archive, kept):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        yield from ((member.name, b"") for member in tar if member.name.startswith(kept))
