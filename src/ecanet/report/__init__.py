"""Write results down: one HTML page a run, pictures, JSON.

Read downward: `report` (`Report`, pages, files written whole or not at all), `figures` (the only place that draws).
"""

from ecanet.report import figures
from ecanet.report.report import Report, environment, page, write_file

__all__ = ["Report", "environment", "figures", "page", "write_file"]
