"""HEIC and AVIF photographs, with and without the packages that read them."""

import sys
from pathlib import Path

import pytest
from PIL import Image, features

from ecanet.data import IMAGE_SUFFIXES, read_image
from ecanet.data.pictures import AVIF_BRANDS, HEIC_BRANDS
from ecanet.errors import DataError


def write_head(path: Path, brand: bytes) -> Path:
    """Write the first bytes of an ISO media file."""
    path.write_bytes(b"\0\0\0\x1cftyp" + brand + bytes(16))
    return path


@pytest.mark.parametrize("brand", HEIC_BRANDS)
@pytest.mark.parametrize("name", ["photo.heic", "PHOTO.HEIF", "renamed.jpg"])
def test_heic_without_its_package_is_one_line(tmp_path, monkeypatch, brand, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError) as caught:
        read_image(write_head(tmp_path / name, brand), 3)
    assert str(caught.value) == f"{tmp_path / name}: HEIC needs pillow-heif; pip install 'ecanet[heic]'"


def test_avif_that_pillow_cannot_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise Image.UnidentifiedImageError

    monkeypatch.setattr(Image, "open", refuse)
    for brand in AVIF_BRANDS:
        with pytest.raises(DataError, match="AVIF needs Pillow 11.3 or newer; pip install --upgrade 'pillow>=11.3'"):
            read_image(write_head(tmp_path / "a.avif", brand), 3)


def test_films_are_no_images(tmp_path):
    for brand in (b"isom", b"mp42", b"qt  "):
        with pytest.raises(DataError, match=r"film\.jpg: cannot be read as an image .not an image."):
            read_image(write_head(tmp_path / "film.jpg", brand), 3)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif(tmp_path):
    Image.new("RGB", (12, 8), (200, 100, 50)).save(tmp_path / "a.avif")
    image = read_image(tmp_path / "a.avif", 3)
    assert image.shape == (3, 8, 12)
    assert (image.float().mean((1, 2)) - image.new_tensor([200, 100, 50]).float()).abs().max() < 8


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'ecanet[heic]'")
    heif.register_heif_opener()
    picture = Image.new("RGB", (64, 32), (200, 100, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it upright, which HEIC's decoder does
    picture.save(tmp_path / "a.heic", exif=exif.tobytes())
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    for name in ("a.heic", "a.jpg"):
        image = read_image(tmp_path / name, 3)
        assert image.shape == (3, 64, 32)
        assert (image.float().mean((1, 2)) - image.new_tensor([200, 100, 50]).float()).abs().max() < 8


def test_folders_list_these_suffixes():
    assert {".heic", ".heif", ".avif", ".jpg"} <= set(IMAGE_SUFFIXES)
