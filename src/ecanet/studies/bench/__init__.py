"""Time ECA-ResNets beside their peers, or any network with and without attention, after each has passed its checks.

Read downward: `pages` (JSON, tables, a page), `figures` (plots), `attached` (`run_model`: any network), `timing` (a
ResNet beside its peers), `arms` (any network with each attention), `check` (checks everything before it is timed),
`layers` (the tails of residual blocks), `networks` (the networks), `measure` (interleaved timing), `traffic` (counts
bytes), `machine` (the environment), `rows` (the rows of the result).
"""

from ecanet.studies.bench.attached import run_model
from ecanet.studies.bench.pages import check_out, show, write
from ecanet.studies.bench.rows import Result
from ecanet.studies.bench.timing import run

__all__ = ["Result", "check_out", "run", "run_model", "show", "write"]
