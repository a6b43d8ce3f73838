"""Time ECA-ResNets beside their peers, after each of them has passed its checks.

Read downward: `pages` (JSON, tables, plot), `timing` (`run`), `check` (checks everything before it is timed), `layers`
(the tails of residual blocks), `networks` (the networks), `measure` (interleaved timing), `traffic` (counts bytes),
`machine` (the environment), `rows` (the rows of the result).
"""

from ecanet.studies.bench.pages import check_out, show, write
from ecanet.studies.bench.rows import Result
from ecanet.studies.bench.timing import run

__all__ = ["Result", "check_out", "run", "show", "write"]
