"""What the gates of a trained network do.

Read downward: `pages` (`run`: records, draws, writes), `records` (records what gates compute, and raises alarms).
"""

from ecanet.studies.gates.pages import run

__all__ = ["run"]
