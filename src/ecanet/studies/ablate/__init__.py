"""Compare attentions fairly: variants x seeds x one recipe.

Read downward: `pages` (writes the result down), `grid` (`run`: the cells, resumable, and the statistics), `rows` (the
variants).
"""

from ecanet.studies.ablate.grid import run
from ecanet.studies.ablate.pages import markdown, write
from ecanet.studies.ablate.rows import VARIANTS

__all__ = ["VARIANTS", "markdown", "run", "write"]
