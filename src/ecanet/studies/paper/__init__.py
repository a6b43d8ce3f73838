"""The paper's tables, with each printed number beside the one that this library counts or measures.

Read downward: `pages` (Markdown and JSON), `figures` (pictures), `tables` (`run`: measure a table), `speed` (training
and inference rates), `runs` (the command that trains a row, and the accuracy of its checkpoint), `costs` (parameters
and operations), `detection` (costs of detectors), `cells` (one number compared with the printed one), `printed` (all
that the paper prints), `rows` (a row and its network).
"""

from ecanet.studies.paper.pages import to_json, to_markdown, write
from ecanet.studies.paper.tables import run

__all__ = ["run", "to_json", "to_markdown", "write"]
