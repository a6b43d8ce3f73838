"""Glyphs and garments: the same images for the same seed, and nothing held out that is seen in training."""

import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ecanet import data
from ecanet.data import garments, glyphs, photographs, typefaces
from ecanet.data.cache import digest_arrays
from ecanet.data.glyphs import CLASSES, GlyphConfig, make_glyphs
from ecanet.data.photographs import load_photographs
from ecanet.data.typefaces import HELD_OUT, find_typefaces
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig, find

FEW = GlyphConfig(train=90, held_out=45)
DRAWN_BY = "2.14.3"
"""The FreeType of Pillow 12.3 and 13.0, which draw the images of these digests; others may round differently."""
DIGESTS = {
    True: "b2124ba0411fd0dbf8051d5427b6e16b5f1c98311f109400873b63381c148023",
    False: "d401a9ba3c6a3ece1bdecadbf2706705064f21a4821ebfcb379e9d52e4f6ff39",
}
ROOT = Path(__file__).parents[2]


@functools.cache
def few(train):
    return make_glyphs(FEW, train=train)


def test_the_same_seed_makes_the_same_images():
    for train in (True, False):
        images, labels = few(train)
        # a smaller set begins with the same images
        fewer = GlyphConfig(train=20, held_out=20)
        again = make_glyphs(fewer, train=train)
        assert np.array_equal(again[0], images[:20])
        assert np.array_equal(again[1], labels[:20])
        for other in (GlyphConfig(train=20, held_out=20, seed=1), GlyphConfig(train=20, held_out=20, hard=True)):
            changed = (make_glyphs(other, train=train)[0] != images[:20]).any((1, 2, 3))
            assert changed.all()
    assert not np.array_equal(few(True)[0], few(False)[0])


@pytest.mark.skipif(features.version("freetype2") != DRAWN_BY, reason=f"not drawn by FreeType {DRAWN_BY}")
@pytest.mark.parametrize("train", [True, False])
def test_another_process_makes_the_same_images(train):
    """The digests were recorded by another process."""
    assert digest_arrays(few(train)) == DIGESTS[train]


@pytest.mark.slow
def test_two_processes_make_the_same_images():
    code = (
        "from ecanet.data.cache import digest_arrays; from ecanet.data.glyphs import GlyphConfig, make_glyphs\n"
        "print(digest_arrays(make_glyphs(GlyphConfig(train=90, held_out=45), train=True)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest_arrays(few(True))


def test_no_typeface_and_no_photograph_is_in_both_parts(monkeypatch):
    """The drawing functions are watched: the lists of both parts might be right and the use of them wrong."""
    seen = {}
    draw, crop = glyphs._draw_glyph, glyphs.crop_square
    for train in (True, False):
        faces, pictures = set(), {}

        def note_face(face, *rest, faces=faces):
            faces.add(face.path)
            return draw(face, *rest)

        def note_photographs(chosen, *rest, pictures=pictures):
            pictures.update({picture.tobytes(): None for picture in chosen})
            return crop(chosen, *rest)

        monkeypatch.setattr(glyphs, "_draw_glyph", note_face)
        monkeypatch.setattr(glyphs, "crop_square", note_photographs)
        make_glyphs(FEW, train=train)
        seen[train] = faces, set(pictures)
    assert not seen[True][0] & seen[False][0]
    assert not {path.parts[-3] for path in seen[True][0]} & {path.parts[-3] for path in seen[False][0]}
    assert not seen[True][1] & seen[False][1]
    assert len(seen[True][0]) > 30
    assert [len(seen[part][1]) for part in (True, False)] == [10, 3]


def test_every_family_is_in_one_part_and_draws_every_class_differently():
    parts = [find_typefaces(train=train) for train in (True, False)]
    assert set(parts[1]) == HELD_OUT
    assert [len(part) for part in parts] == [42, 14]
    assert sum(len(faces) for part in parts for faces in part.values()) == 345
    for face in (faces[0] for part in parts for faces in part.values()):
        font = face.load(40)
        assert len({bytes(font.getmask(character)) for character in CLASSES}) == len(CLASSES), face


def test_a_variable_font_is_drawn_at_its_weights():
    faces = find_typefaces(train=False)["merriweather"]
    upright = [face for face in faces if "Italic" not in face.path.name]
    ink = [np.asarray(face.load(60).getmask("H")).sum() for face in upright]
    assert [face.weight for face in upright] == [300, 400, 500, 600, 700, 800, 900]
    assert ink == sorted(ink)
    assert ink[-1] > 1.5 * ink[0]


def test_classes_are_balanced():
    for train in (True, False):
        assert np.bincount(few(train)[1]).tolist() == [2 if train else 1] * len(CLASSES)
    assert np.ptp(np.bincount(make_glyphs(GlyphConfig(train=50), train=True)[1])) == 1


def test_a_glyph_stays_inside_its_image_and_stands_out(monkeypatch):
    draw = glyphs._draw_glyph

    def check(*arguments):
        glyph = draw(*arguments)
        assert glyph.min() >= 0
        assert glyph.max() <= 1
        assert glyph.sum() > 12  # pixels of ink
        edge = np.concatenate([glyph[0], glyph[-1], glyph[:, 0], glyph[:, -1]])
        assert edge.sum() < 0.1 * glyph.sum()
        return glyph

    monkeypatch.setattr(glyphs, "_draw_glyph", check)
    make_glyphs(FEW, train=True)
    square = np.zeros((32, 32, 1))
    square[8:24, 8:24] = 1
    for seed in range(50):
        random = np.random.default_rng(seed)
        background = np.full((32, 32, 3), random.uniform(0, 255, 3))
        grey = np.asarray(Image.fromarray(glyphs._blend(square, background, glyphs.EASY, random)).convert("L")) * 1.0
        # the least contrast, 70, at the least opacity, 0.8, less the noise that is left in the mean of 256 pixels
        assert abs(grey[8:24, 8:24].mean() - grey[:8].mean()) > 50


def test_the_set_is_loaded_by_its_name_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "GlyphConfig", functools.partial(GlyphConfig, train=90, held_out=45))
    config = DataConfig(name="glyphs", root=str(tmp_path), batch_size=10)
    module = data.build(config)
    assert (len(module.train), len(module.held_out)) == (90, 45)
    assert module.spec.class_names == tuple(CLASSES)
    assert torch.equal(module.train.images, torch.as_tensor(few(True)[0]).permute(0, 3, 1, 2))
    assert module.spec.normalize(module.train.images).mean().abs() < 0.2
    hard = data.build(config.but(name="glyphs:hard"), train=False)
    assert not torch.equal(hard.held_out.images, module.held_out.images)
    monkeypatch.setattr(glyphs, "make_glyphs", None)
    assert torch.equal(data.build(config, seed=3).held_out.images, module.held_out.images)
    assert find("glyphs:hard").data.name == "glyphs:hard"


def test_missing_fonts_are_one_line_with_the_command(ecanet, monkeypatch, tmp_path):
    monkeypatch.setitem(typefaces.FAMILIES, "no-such-family==1.0", "0" * 12)
    code, _, err = ecanet("train", "glyphs", "--data-dir", tmp_path)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "1 are missing or have other files (fontpkg-no-such-family==1.0)" in err
    assert "pip install 'ecanet[glyphs]'" in err
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("train", [True, False])
def test_another_version_of_a_font_is_refused(monkeypatch, train):
    monkeypatch.setitem(typefaces.FAMILIES, "lora==3.8", "0" * 12)
    with pytest.raises(DataError, match=r"1 are missing or have other files \(fontpkg-lora==3.8\)"):
        find_typefaces(train=train)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("skimage/data/none.png", "is missing"), ("no_package/none.png", "is missing"), ("", "is not the file of")],
)
def test_wrong_photographs_are_refused(monkeypatch, path, problem):
    path = path or next(iter(photographs.PHOTOGRAPHS["train"]))
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "train", {path: "0" * 12})
    with pytest.raises(DataError, match=f"{problem}.*{re.escape(chr(39))}ecanet\\[glyphs\\]"):
        load_photographs("train")


def test_the_extra_and_the_constraints_list_the_fonts_of_the_set():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["glyphs"]
    fonts = {f"fontpkg-{package}" for package in typefaces.FAMILIES}
    assert {need for need in extra if need.startswith("fontpkg-")} == fonts
    assert fonts <= set((ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.parametrize("wrong", [{"train": 0}, {"held_out": 0}, {"seed": -1}])
def test_invalid_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"glyphs: {name} must be at least"):
        GlyphConfig(**wrong)


# garments


def load_squares(root, train):
    """Return eight grey squares in the place of Fashion-MNIST."""
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 8:20] = 255 if train else 128
    return images, torch.arange(8)


def test_garments_show_clothing_on_photographs_of_their_part(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    real = garments.load_photographs
    monkeypatch.setattr(garments, "load_photographs", lambda part: asked.append(part) or real(part))
    load = garments.make_loader(load_squares)
    for train in (True, False):
        images, labels = load(None, train)
        assert images.shape == (8, 3, 32, 32)
        assert labels.tolist() == list(range(8))
        for image in images:
            # one colour covers 12 x 12 pixels, wherever the clothing stands
            colours, counts = torch.unique(image.flatten(1), dim=1, return_counts=True)
            assert counts.max() >= 144
            assert colours[:, counts.argmax()].max() >= (0.3 * 128 if not train else 0.3 * 255) - 1
        assert len({image.numpy().tobytes() for image in images}) == 8
    assert asked == ["train", "held out"]
    again, _ = load(None, False)
    assert torch.equal(again, images)
    assert len(asked) == 2


def test_other_clothing_makes_other_garments(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, _ = garments.make_loader(load_squares)(None, True)
    second, _ = garments.make_loader(lambda root, train: load_squares(root, not train))(None, True)
    assert not torch.equal(first, second)
