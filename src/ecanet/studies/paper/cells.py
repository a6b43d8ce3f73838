"""One cell of a table: the printed number, and the number that this library found."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BINARY", "DECIMAL", "MODERN", "Cell", "compare_with_printed"]

BINARY = {"M": 2**20, "G": 2**30}
"""Units of the ImageNet tables, by the suffix of the printed number."""
DECIMAL = {"M": 10**6, "": 10**9}
"""Units of the detection tables, which print GFLOPs without a suffix."""
MODERN = {"M": 10**6, "G": 10**9}
"""Units of the later papers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The printed text, and the number found here.

    ``here`` is empty if it would repeat the printed number. ``agrees`` is None if nothing was compared.
    """

    printed: str
    here: str = ""
    agrees: bool | None = None

    def __str__(self) -> str:
        if self.agrees:
            return f"{self.printed} ✓" + (f" ({self.here})" if self.here else "")
        return f"{self.printed} (here {self.here})" if self.here else self.printed


def compare_with_printed(
    printed: str, found: int, detail: str, *, own: bool, units: Mapping[str, int] = BINARY
) -> Cell:
    """Return the cell of the count ``found``, compared with ``printed`` ("24.37M", "3.86G") to its last digit.

    ``units`` maps the printed number's suffix to its unit. ``detail`` is shown where the two differ. Truncation is
    accepted instead of rounding only in rows that the authors counted themselves (``own``).

    >>> str(compare_with_printed("24.37M", 25_557_032, "", own=True))
    '24.37M ✓'
    >>> str(compare_with_printed("319.9M", 335_512_960, "", own=True))
    '319.9M ✓ (319.97 truncated)'
    >>> str(compare_with_printed("25.80M", 25_779_072, "25.78 x 10^6", own=False))
    '25.80M (here 24.58M; 25.78 x 10^6)'
    """
    number = printed.rstrip("MG")
    suffix = printed[len(number) :]
    digits = len(number.partition(".")[2])
    value = found / units[suffix]
    if f"{value:.{digits}f}" == number:
        return Cell(printed=printed, agrees=True)
    if own and f"{int(value * 10**digits) / 10**digits:.{digits}f}" == number:
        return Cell(printed=printed, here=f"{value:.{digits + 1}f} truncated", agrees=True)
    return Cell(printed=printed, here=f"{value:.{digits}f}{suffix}; {detail}", agrees=False)
