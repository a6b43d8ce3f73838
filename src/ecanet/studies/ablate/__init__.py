"""Compare attentions fairly: train every variant of a network with every seed on one recipe.

Read downward: `pages` (Markdown, JSON and HTML), `figures` (the picture), `grid` (`run`: the runs, which can be
resumed), `comparison` (means, intervals and paired differences), `metrics` (what is compared), `variants` (the networks
to compare), `controls` (the larger one).
"""

from ecanet.studies.ablate.comparison import estimate
from ecanet.studies.ablate.grid import run
from ecanet.studies.ablate.pages import to_json, to_markdown, write
from ecanet.studies.ablate.variants import VARIANTS

__all__ = ["VARIANTS", "estimate", "run", "to_json", "to_markdown", "write"]
