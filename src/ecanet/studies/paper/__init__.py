"""The paper's tables, each number beside what is measured here.

Read downward: `pages` (Markdown, JSON, pictures), `tables` (`run`), `runs` (commands that train a row, and scores),
`detection` (costs of detectors), `rows` (what the paper prints).
"""

from ecanet.studies.paper.pages import markdown, to_json, write
from ecanet.studies.paper.tables import run

__all__ = ["markdown", "run", "to_json", "write"]
