"""Random broken files and command lines: each is used, or refused in one line, within a minute.

A small share runs by default; `make fuzz` runs all and prints the counts. docs/robustness.md has the last ones.
"""

import io
import json
import math
import sys
import zipfile
from pathlib import Path
from random import Random

import click
import pytest
import torch
import typer
from PIL import Image

import ecanet as library
from ecanet import training
from ecanet.__main__ import main
from ecanet.data import read_image
from ecanet.data.annotations import read_annotations
from ecanet.data.boxes import DetectionDataset
from ecanet.models import read_file
from ecanet.recipes import RECIPES, DataConfig, ModelConfig, Recipe, from_dict, to_dict
from fuzzing import SEED, VALUES, Tally, break_bytes, break_value

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = Recipe(name="made", data=DataConfig(name="digits", workers=0), model=ModelConfig(name="resnet8"))
SPEC = {"class_names": [str(i) for i in range(10)], "channels": 1, "size": 8, "mean": [0.3], "std": [0.3]}


def share(few: int, many: int) -> list[object]:
    """Return the numbers of cases: a few by default, many by `make fuzz`."""
    return [few, pytest.param(many, marks=pytest.mark.fuzz)]


def make_content() -> dict[str, object]:
    """Return the content of a run's checkpoint, as far as evaluation looks at it."""
    torch.manual_seed(0)
    state = library.create_model("resnet8", num_classes=10, in_channels=1).state_dict()
    return {
        "epoch": 0,
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "ecanet": {"recipe": to_dict(RECIPE), "spec": SPEC, "split": None, "batch": 64},
    }


def use_checkpoint(path: Path) -> None:
    content = read_file(path)
    library.load_checkpoint(library.create_model("resnet8", num_classes=10, in_channels=1), path)
    if isinstance(content, dict) and "ecanet" in content:
        training.restore(path)


@pytest.mark.parametrize("count", share(24, 3000))
def test_checkpoints(tmp_path, count):
    """Flipped bits; changes of the pickle under a right checksum; broken contents; old and safetensors files."""
    random, tally, content = Random(SEED), Tally("checkpoints"), make_content()
    safetensors = pytest.importorskip("safetensors.torch")
    files: dict[str, bytes] = {}
    for name, options in (("zip.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save(content, tmp_path / name, **options)
        files[name] = (tmp_path / name).read_bytes()
    about = json.dumps(content["ecanet"])
    files["a.safetensors"] = safetensors.save(
        {name.removeprefix("model."): value for name, value in content["state_dict"].items()}, {"ecanet": about}
    )
    with zipfile.ZipFile(io.BytesIO(files["zip.pt"])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for case in range(count):
        name, kind = random.choice(list(files)), random.randrange(4)
        path = tmp_path / f"broken{Path(name).suffix}"
        if kind == 0:
            path.write_bytes(break_bytes(random, files[name]))
        elif kind == 1:
            # the header of safetensors and the pickle of old files lie at the beginning
            path.write_bytes(break_bytes(random, files[name][:20_000]) + files[name][20_000:])
        elif kind == 2:
            path = tmp_path / "broken.pt"
            with zipfile.ZipFile(path, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, break_bytes(random, data) if member.endswith("data.pkl") else data)
        else:
            path = tmp_path / "broken.pt"
            try:
                torch.save(break_value(random, content, random.choice((1, 2, 5))), path)
            except Exception:  # what cannot be written cannot be read
                continue
        tally.call(f"case {case}, {name}, kind {kind}", lambda path=path: use_checkpoint(path))
    tally.finish()


def make_annotations(folder: Path) -> dict[str, object]:
    (folder / "images").mkdir()
    images = []
    for number in range(1, 4):
        Image.new("RGB", (40 + number, 30)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 40 + number, "height": 30})
    boxes = [{"bbox": [5, 5, 10 + i, 8], "area": 80.0, "iscrowd": int(i == 4)} for i in range(6)]
    shapes: list[object] = [[[5.0, 5, 15, 5, 15, 13, 5, 13]], {"size": [30, 41], "counts": [100, 30, 1100]}]
    for i, box in enumerate(boxes):
        crowd = {"size": [30, 41 + i % 3], "counts": [10, 30, 30 * (41 + i % 3) - 40]}
        box |= {"id": i, "image_id": 1 + i % 3, "category_id": 7 + i % 2, "segmentation": crowd if i % 2 else shapes[0]}
    return {"images": images, "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}], "annotations": boxes}


def use_annotations(path: Path, images: Path, skip: bool) -> None:
    for masks in (True, False):
        found = read_annotations(path, images, masks=masks, skip=skip)
        dataset = DetectionDataset(found)
        for picture in found.pictures:
            dataset.make_target(picture)
        found.to_coco()


@pytest.mark.parametrize("count", share(150, 4000))
def test_annotations(tmp_path, count):
    random, tally, whole = Random(SEED), Tally("annotation files"), make_annotations(tmp_path)
    path = tmp_path / "broken.json"
    text = json.dumps(whole)
    use_annotations_whole = tmp_path / "whole.json"
    use_annotations_whole.write_text(text)
    use_annotations(use_annotations_whole, tmp_path / "images", False)
    for case in range(count):
        if random.random() < 0.2:
            path.write_bytes(break_bytes(random, text.encode()))
        else:
            try:
                path.write_text(json.dumps(break_value(random, whole, random.choice((1, 1, 2, 4)))))
            except (ValueError, TypeError):
                continue
        skip = random.random() < 0.5
        tally.call(f"case {case}", lambda skip=skip: use_annotations(path, tmp_path / "images", skip))
    tally.finish()


def make_images() -> dict[str, bytes]:
    """Return small images in every format, with EXIF data where the format has them."""
    picture = Image.effect_noise((37, 29), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description " * 20
    made: dict[str, bytes] = {}
    for kind, options in {
        "JPEG": {"exif": exif}, "PNG": {"exif": exif}, "GIF": {}, "BMP": {}, "TIFF": {"exif": exif}, "PPM": {},
        "WEBP": {"exif": exif}, "AVIF": {}, "MPO": {"save_all": True, "append_images": [picture]},
    }.items():  # fmt: skip
        file = io.BytesIO()
        if kind in Image.SAVE or (Image.init() and kind in Image.SAVE):
            picture.save(file, format=kind, **options)
            made[kind] = file.getvalue()
    for kind, mode in (("PNG", "I;16"), ("PNG", "P"), ("PNG", "LA"), ("TIFF", "F"), ("TIFF", "CMYK"), ("GIF", "P")):
        file = io.BytesIO()
        (picture.convert("L").convert(mode) if mode != "I;16" else Image.new(mode, (20, 20), 999)).save(
            file, format=kind
        )
        made[f"{kind} {mode}"] = file.getvalue()
    return made


def use_image(path: Path, channels: int) -> None:
    image = read_image(path, channels)
    assert (image.dtype, image.shape[0], image.dim()) == (torch.uint8, channels, 3)


@pytest.mark.parametrize("count", share(200, 4000))
def test_images(tmp_path, count):
    random, tally, files = Random(SEED), Tally("images"), make_images()
    path = tmp_path / "photo.jpg"
    for case in range(count):
        kind = random.choice(list(files))
        data = files[kind]
        if random.random() < 0.1:  # the beginning of one format, the end of another
            data = data[: random.randrange(40)] + files[random.choice(list(files))][random.randrange(40) :]
        path.write_bytes(break_bytes(random, data))
        tally.call(f"case {case}, {kind}", lambda: use_image(path, random.choice((1, 3))))
    tally.finish()


def use_recipe(folder: Path) -> None:
    recipe = training.read_recipe(folder)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert not [value for value in to_dict(recipe).values() if isinstance(value, float) and not math.isfinite(value)]


@pytest.mark.parametrize("count", share(150, 2000))
def test_recipes(tmp_path, count):
    random, tally = Random(SEED), Tally("recipes")
    path = tmp_path / "recipe.json"
    for case in range(count):
        recipe = to_dict(random.choice(list(RECIPES.values()))())
        if random.random() < 0.3:
            path.write_bytes(break_bytes(random, json.dumps(recipe).encode()))
        else:
            try:
                path.write_text(json.dumps(break_value(random, recipe, random.choice((1, 1, 2, 5)))))
            except (ValueError, TypeError):
                continue
        tally.call(f"case {case}", lambda: use_recipe(tmp_path))
    tally.finish()


# command lines

GOOD = {
    "recipe": ["digits", "quickstart", "folder:photos"],
    "models": ["resnet8", "resnet18", "torchvision:resnet18", "timm:resnet18"],
    "model": ["resnet8", "resnet20", "torchvision:resnet18", "nets.py:make"],
    "name": ["resnet8", "torchvision:alexnet"],
    "checkpoint": ["run", "run/checkpoints/best.ckpt", "file.ckpt"],
    "run": ["run"],
    "paths": ["run", "picture.png", "photos", "file.ckpt"],
    "attention": ["eca", "se", "none", "cbam"],
    "attach": ["eca", "se"],
    "kernel_sizes": ["3", "adaptive", "3,3,5", "official"],
    "weights": ["none", "file.ckpt", "out.pth"],
    "data": ["digits", "folder:photos"],
    "device": ["cpu", "auto"],
    "epochs": ["1"],
    "batch_size": ["64", "7"],
    "learning_rate": ["0.01"],
    "settings": ["data.workers=0", "ema_decay=0.9", "mixup=0.2", "accumulate=2", "schedule.name=step", "reduction=4"],
    "out": ["out", "out.pth", "out/deep/er.safetensors"],
    "resume": ["run"],
    "seeds": ["1"],
    "variants": ["none,eca", "eca"],
    "table": ["3", "1", "poster", "figure4"],
    "measure": ["params", "params,flops"],
    "image": ["picture.png"],
    "logger": ["none", "csv"],
    "top": ["3"],
    "threshold": ["0.3"],
    "on_corrupt": ["skip", "error"],
    "where": ["layer2.*", "layer4"],
    "replace": ["se"],
    "which": ["best", "last"],
    "image_size": ["32", "64"],
    "seed": ["3"],
    "val_share": ["0.5"],
    "data_dir": ["photos"],
    "classes": ["1,2"],
}
"""Values that make sense, by the parameter's name."""

BAD = [
    "", "-1", "0", "1e99", "nan", "99999999999999999999", "nowhere", "a" * 4000, "é\u2028", "../..", "/", "=", "a=b",
    "a.b=1", "epochs=0", "data.batch_size=0", "model.options={}", 'name="\\ud800"', "data.workers=1e9", "cuda:99",
    "picture.png", "broken.ckpt", "photos/empty", "recipe.json", "[", "{}", "timm:", "torchvision:", ":", "x.py:",
    "nets.py:nothing", "*", "--", "data.image_size=100000", "model.kernel_sizes=[9999]", "1,,2", ",",
    "optimizer.learning_rate=NaN",
]  # fmt: skip

FIXED = {
    "train": ["--epochs", "1", "--set", "min_steps=0", "--device", "cpu"],
    "ablate": ["--seeds", "1", "--epochs", "1", "--variants", "none,eca", "--model", "resnet8"],
    "bench": ["--batch-size", "none"],  # a good one takes minutes
}
"""What keeps a command short, after the random arguments."""


def prepare(folder: Path, *, whole: bool) -> None:
    """Write what the good arguments name: a run (if ``whole``), images, weights, a network's file; and broken ones."""
    if whole:
        training.run(RECIPE.but(epochs=1), folder=folder / "run", device="cpu", quiet=True, loggers="none")
    torch.save(make_content(), folder / "file.ckpt")
    (folder / "broken.ckpt").write_bytes((folder / "file.ckpt").read_bytes()[:1000])
    (folder / "recipe.json").write_text("{}")
    (folder / "nets.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes=10):\n"
        "    features = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(*features, nn.Linear(8, num_classes))\n"
    )
    for label, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (folder / "photos" / label).mkdir(parents=True)
        for at in range(4):
            Image.new("RGB", (32, 32), colour).save(folder / "photos" / label / f"{at}.png")
    (folder / "photos" / "empty").mkdir()
    Image.new("L", (8, 8), 90).save(folder / "picture.png")


def draw_line(random: Random, commands: dict[str, click.Command]) -> list[str]:
    """Return a command with some of its arguments and options: most have good values."""
    name = random.choice(list(commands))
    line = [name]
    for parameter in commands[name].params:
        needed = isinstance(parameter, click.Argument)
        key = str(parameter.name)
        if random.random() > (0.85 if needed else 0.2) and key != "table":  # all tables of the paper take a minute
            continue
        values = GOOD.get(key, ["1"]) if random.random() < 0.75 else BAD
        if key == "help" or getattr(parameter, "is_flag", False):
            line += [] if key == "help" and random.random() < 0.9 else [random.choice(parameter.opts)]
            continue
        for _ in range(random.choice((1, 1, 2)) if parameter.multiple or parameter.nargs == -1 else 1):
            line += [random.choice(values)] if needed else [parameter.opts[0], random.choice(values)]
    if random.random() < 0.05:
        line.insert(random.randrange(len(line) + 1), random.choice(["--nonsense", "-x", "--", *map(str, VALUES[:9])]))
    return line + FIXED.get(name, [])


def run_line(line: list[str], monkeypatch, capsys) -> str:
    """Run a command line and return its outcome; another exit code or more than a line of error is a fault."""
    monkeypatch.setattr(sys, "argv", ["ecanet", *line])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    code, err = stop.value.code, capsys.readouterr().err
    assert code in (0, 2, 130, 143, None), f"exit code {code}"
    assert "Traceback" not in err
    if code == 2:
        said = [row for row in err.splitlines() if row.startswith("ecanet: ")]
        assert len(said) == 1, err[-300:]
    return f"exit {code or 0}"


@pytest.mark.parametrize("count", share(10, 300))
def test_commands(tmp_path, monkeypatch, capsys, count):
    from ecanet.cli import app

    group = typer.main.get_command(app)
    commands = dict(group.commands)
    random, tally = Random(SEED), Tally("command lines")
    if count < 100:  # those that take seconds are for `make fuzz`
        commands = {name: commands[name] for name in ("models", "weights", "detect", "predict", "eval", "bench")}
    prepare(tmp_path, whole=count >= 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for case in range(count):
        line = draw_line(random, commands)
        tally.call(f"case {case}: ecanet {' '.join(line)}", lambda line=line: run_line(line, monkeypatch, capsys))
    with capsys.disabled():
        print(f"\n{tally}")
    tally.finish()
