"""Time ECA-ResNets beside their peers, once every one of them has been checked.

Read downward: `pages` (JSON, table, plot), `timing` (`run`), `check` (nothing is timed that has not been checked),
`layers` (the ends of residual blocks), `networks` (which networks), `measure` (interleaved timing), `traffic` (counts
bytes).
"""

from ecanet.studies.bench.pages import check_out, show, write
from ecanet.studies.bench.timing import run

__all__ = ["check_out", "run", "show", "write"]
