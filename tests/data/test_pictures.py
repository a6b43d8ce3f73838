"""HEIC and AVIF photographs, with and without the packages that read them; files that are no photographs."""

import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from torchvision.transforms.v2.functional import center_crop, resize

from bounds import bounded
from ecanet.data import IMAGE_SUFFIXES, DataSpec, build_eval_transform, read_image
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
    def refuse(path: Path, formats: list[str]) -> None:
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


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_are_no_images_whatever_the_file_is_called(tmp_path, kind):
    """Pillow runs Ghostscript for PostScript."""
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.jpg", format=kind)
    with pytest.raises(DataError, match=r"photo\.jpg: cannot be read as an image .not an image."):
        read_image(tmp_path / "photo.jpg", 3)


def test_the_files_of_cameras_with_several_pictures(tmp_path):
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "photo.jpg", 3)[:, 0, 0].tolist() == pytest.approx([254, 0, 0], abs=2)


@pytest.mark.parametrize("shape", [(3, 1, 60_000), (3, 60_000, 1), (1, 2, 9000)])
def test_a_line_of_pixels_is_not_blown_up(shape):
    spec = DataSpec(class_names=("a",), channels=3, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875)
    image = torch.zeros(shape, dtype=torch.uint8)
    image[:, max(0, shape[1] // 2 - 4) :, max(0, shape[2] // 2 - 4) :] = 255
    image[:, shape[1] // 2 + 5 :] = image[:, :, shape[2] // 2 + 5 :] = 0
    with bounded(2, 2**27):
        seen = build_eval_transform(spec)(image)
    assert seen.shape == (shape[0], 224, 224)
    assert seen[:, 112, 112].min() > 200  # the center of the image is that of the crop


def test_other_images_are_resized_as_they_were():
    spec = DataSpec(class_names=("a",), channels=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.8)
    image = torch.randint(0, 256, (3, 10, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = center_crop(resize(image, [40], antialias=True), [32, 32])
    assert torch.equal(build_eval_transform(spec)(image), expected)


def test_a_picture_of_too_many_pixels_is_one_line(tmp_path):
    """150 kB of zeros in a PNG file, which would be 1.2 GB."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(20_000 * 3 + 1) * 2000, 9)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with bounded(2, 2**25), pytest.raises(DataError, match=r"bomb\.png: .*400000000 pixels"):
        read_image(tmp_path / "bomb.png", 3)


def test_folders_list_these_suffixes():
    assert {".heic", ".heif", ".avif", ".jpg"} <= set(IMAGE_SUFFIXES)
