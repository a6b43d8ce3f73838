"""List the images below class folders, and everything there that is not one."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ecanet.data.pictures import IMAGE_SUFFIXES
from ecanet.errors import DataError

__all__ = ["Listing", "describe_ignored", "find_similar_names", "list_folder", "list_names", "make_readable"]

SILENT = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that file managers leave in every folder."""

RUN_FILES = {"recipe.json", "environment.json"}
"""A folder with these is a run's. It may lie below the photographs, and its example images are none of them."""

KINDS = {
    "other": ("file that is no image", "files that are no images"),
    "hidden": ("hidden file or folder", "hidden files and folders"),
    "empty": ("folder without files", "folders without files"),
    "outside": ("image outside the class folders", "images outside the class folders"),
    "run": ("folder of a run", "folders of runs"),
    "beside": ("folder beside the training and held-out images", "folders beside the training and held-out images"),
    "again": ("second name of an image", "second names of images"),
}
"""The words for one entry, and for several, of each kind that is ignored."""

NAMED = 3
"""Number of names in a message."""


@dataclass(slots=True)
class Listing:
    """The images of class folders by class, and the ignored entries by kind (`KINDS`).

    Paths are relative to the folder of the class folders and have forward slashes, such as ``cat/1.jpg``.
    """

    images: dict[str, list[str]]
    ignored: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def list_names(folder: Path) -> list[str]:
    """Return the sorted names of the folders in ``folder`` that are not hidden."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_folder(folder: Path) -> Listing:
    """Return the images below the class folders in ``folder``, sorted. A class without images has an empty list.

    Links are followed, and a folder that several links lead to is read once for each class.

    Raises:
        DataError: ``folder`` holds no class folders.
    """
    names = list_names(folder)
    if not names:
        raise DataError(f"{folder}: no class folders; put the images of each class into a folder named after the class")
    listing = Listing(images={})
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name.startswith("."):
                listing.ignored["hidden"].append(f"{path.name}/")
        else:
            _add_file(listing, path.name, listing.ignored["outside"])
    for name in names:
        listing.images[name] = []
        for prefix, files in _walk(folder / name, f"{name}/", listing):
            for file in files:
                _add_file(listing, prefix + file, listing.images[name])
        listing.images[name].sort()
    return listing


def describe_ignored(ignored: Mapping[str, Sequence[str]], folder: Path) -> str | None:
    """Return one line that counts the ignored entries and names the first of each kind, or None.

    >>> describe_ignored({"other": ["a.txt", "b.mov", "cat/c.txt", "cat/d.txt"], "empty": ["new/"]}, Path("photos"))
    'ignored 4 files that are no images: a.txt, b.mov, cat/c.txt, …; 1 folder without files: new/ (in photos)'
    """
    parts = [
        f"{len(paths)} {KINDS[kind][len(paths) > 1]}: {shorten(sorted(paths))}"
        for kind, paths in ignored.items()
        if paths
    ]
    return f"ignored {'; '.join(parts)} (in {folder})" if parts else None


def shorten(names: Sequence[str]) -> str:
    """Return the first few ``names`` in one line."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:NAMED]]
    return ", ".join(shown + ["…"] * (len(names) > NAMED))


def make_readable(name: str) -> str:
    """Return the name of a file as a text for pages and terminals: other bytes and control characters are escaped.

    >>> make_readable("caf\\udce9"), make_readable("two\\nlines"), make_readable("$5 é")
    ('caf\\\\xe9', 'two\\\\nlines', '$5 é')
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def find_similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of ``names`` that differ by upper and lower case, or by how accents are stored, alone.

    >>> find_similar_names(["Cat", "cat", "dog"])
    [('Cat', 'cat')]
    """
    first: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for name in names:
        known = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        pairs += [(known, name)] if known != name else []
    return pairs


def _walk(folder: Path, prefix: str, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Yield the path of each folder below ``folder``, with a slash at its end, and the names of its files."""
    visited: set[tuple[int, int]] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        below = Path(at).relative_to(folder).as_posix()
        here = prefix if below == "." else f"{prefix}{below}/"
        status = Path(at).stat()
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above would lead round in a circle
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if set(files) >= RUN_FILES:
            listing.ignored["run"].append(here)
            folders.clear()
            continue
        if not folders and not set(files) - set(SILENT):
            listing.ignored["empty"].append(here)
        listing.ignored["hidden"] += [f"{here}{name}/" for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, files


def _add_file(listing: Listing, path: str, images: list[str]) -> None:
    """Add ``path`` to ``images`` if it is an image by its name, else to the ignored entries."""
    name = path.rpartition("/")[2]
    if name in SILENT:
        return
    if name.startswith("."):
        listing.ignored["hidden"].append(path)
    elif name.lower().endswith(IMAGE_SUFFIXES):
        images.append(path)
    else:
        listing.ignored["other"].append(path)
