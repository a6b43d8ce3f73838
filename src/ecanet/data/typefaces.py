"""The typefaces of the data set ``glyphs``: fixed versions of font packages, each named with the digest of its files.

The packages (``fontpkg-NAME``) hold families of Google Fonts, unmodified, under the SIL Open Font Licence 1.1, or under
the Apache Licence 2.0 (Roboto Slab, Satisfy, Yellowtail). A family that the network trains on has no typeface among
the held-out ones.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from ecanet.data.photographs import find_package
from ecanet.errors import DataError

__all__ = ["FAMILIES", "HELD_OUT", "Typeface", "find_typefaces"]

_TABLE = """
abel==1.3 314abb8797b5
abril-fatface==1.1 ed395c5ec7a0
acme==1.2 f42cd9f97590
alfa-slab-one==2.0 9dfe81359d1b
anton==2.116 a89ba7f89c97
arvo==1.6 7a766b5c2cd0
barlow-condensed==1.408 4cfc9ca55446
bitter==3.21 1fc604769895
black-ops-one==1.4 3b02df8c3600
cardo==1.45 f83cbc3726da
caveat==2.0 6256c8c1fba4
changa-one==1.3 08913ab2395e
comfortaa==3.105 e48df1212d12
cormorant-garamond==4.1 a2416eebc085
crimson-pro==1.3 7e22e95293ff
dancing-script==2.1 20c838bf6131
delius==1.1 22197605ba26
dosis==3.2 d0ab3ec6092c
eb-garamond==1.3 e83e4cf43864
exo-2==2.10 58a111ee9d56
fira-sans==4.203 3327a2153c21
fredoka==2.1 47055e87149c
gravitas-one==1.1 7a8af1c1713d
ibm-plex-mono==2.3 e89bac5aea20
inconsolata==3.1 e88c3a7af0dd
indie-flower==2.0 81a54091ae85
jetbrains-mono==2.211 4212f669b17d
josefin-sans==2.1 127fbade86d0
kalam==2.1 0c740bfbced2
lato==2.15 bdaa2c678931
lobster==2.100 3c15497de70b
lora==3.8 45908a854cb7
merriweather==2.100 bcec75b7802a
montserrat==9.0 d2255df7a2c6
noto-sans==2.15 606b9a58ce17
oleo-script==1.2 672fcf3aef2e
orbitron==2.1 f278c48f1ce3
oswald==4.103 28aeb7171e3b
pacifico==3.1 6def11bbc54f
playfair-display==1.203 d12f6c27e795
press-start-2p==3.0 2ed0e13cc186
pt-serif==1.0 9a3c12f51427
quicksand==3.6 3e0482e3062a
righteous==1.0 a57a45378617
roboto-slab==2.2 6880d399a93b
rowdies==1.0 4d39f729aa6f
russo-one==1.0 b6c87b1e6cd1
saira==1.101 4b2d4c9dd227
satisfy==1.1 d9f6b61aebb7
shadows-into-light==1.0 a6355c6cf41c
space-mono==1.3 8fdbdfa02942
vollkorn==5.1 89771f145ee1
work-sans==2.12 98a65e9b2cdf
yellowtail==1.2 9db13308b955
zeyada==1.2 6c636bb90eb8
zilla-slab==1.2 aa0ad73710fa
"""

FAMILIES = {package: digest for package, _, digest in (line.partition(" ") for line in _TABLE.split("\n")[1:-1])}
"""The digest of each package's font files, by the family's name and the package's version."""

HELD_OUT = frozenset(
    {
        *("alfa-slab-one", "barlow-condensed", "cardo", "delius", "exo-2", "ibm-plex-mono", "kalam"),
        *("lobster", "lora", "merriweather", "montserrat", "righteous", "rowdies", "zilla-slab"),
    }
)
"""The families of the held-out part. As in the training part there are sans, serif, slab, display and others."""

TOO_THIN = ("Thin", "ExtraLight")
"""Weights whose strokes disappear in images of 32 pixels."""

WEIGHTS = (300, 400, 500, 600, 700, 800, 900)
"""Weights that are taken from a variable font, where it has them."""


@dataclass(frozen=True, slots=True)
class Typeface:
    """One typeface: a font file and, for a variable font, the weight (100 to 900) at which it is drawn."""

    path: Path
    weight: int | None = None

    def load(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the typeface at ``size`` pixels for an em."""
        # The engine is named because Pillow would choose another one where libraqm is installed.
        font = ImageFont.truetype(str(self.path), size, layout_engine=ImageFont.Layout.BASIC)
        if self.weight is not None:
            axes = font.get_variation_axes()
            positions = [self.weight if _is_weight(axis) else axis["default"] for axis in axes]
            font.set_variation_by_axes([float(position or 0) for position in positions])
        return font


def find_typefaces(*, train: bool) -> dict[str, list[Typeface]]:
    """Return the typefaces of each family of the training part, or of the held-out part.

    Raises:
        DataError: a package of either part is missing, or has other files than the data set is made from.
    """
    folders = {package: find_package(f"fontpkg_{_name(package).replace('-', '_')}") for package in FAMILIES}
    wrong = [p for p, folder in folders.items() if folder is None or _digest_fonts(folder) != FAMILIES[p]]
    if wrong:
        raise DataError(
            f"glyphs needs {len(FAMILIES)} font packages, and {len(wrong)} are missing or have other files "
            f"(fontpkg-{wrong[0]}); install them with: pip install 'ecanet[glyphs]'"
        )
    chosen = {_name(p): folder for p, folder in folders.items() if folder and (_name(p) in HELD_OUT) != train}
    return {name: _list_typefaces(folder) for name, folder in chosen.items()}


def _name(package: str) -> str:
    return package.partition("==")[0]


def _list_files(folder: Path) -> list[Path]:
    return sorted((folder / "files").glob("*.ttf"), key=lambda path: path.name)


@functools.cache
def _digest_fonts(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _list_files(folder):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _is_weight(axis: ImageFont.Axis) -> bool:
    return axis.get("name") == b"Weight"


def _list_typefaces(folder: Path) -> list[Typeface]:
    faces: list[Typeface] = []
    for path in _list_files(folder):
        # The file name of a variable font lists its axes: "Rubik[wght].ttf".
        if "wght" in path.name:
            axis = next(a for a in ImageFont.truetype(str(path)).get_variation_axes() if _is_weight(a))
            low, high = axis["minimum"] or 0, axis["maximum"] or 0
            faces.extend(Typeface(path, w) for w in WEIGHTS if low <= w <= high)
        elif not any(thin in path.stem for thin in TOO_THIN):
            faces.append(Typeface(path))
    return faces
