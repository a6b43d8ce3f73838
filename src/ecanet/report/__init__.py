"""Results on disk: JSON, pictures, and one HTML page per run.

The files, in reading order: `report` (the results of a run), `html_page` (the layout of a page), `settings` (shows a
recipe), `pictures` (images with classes and boxes), `figures` (draws the plots), `artifacts` (what a run keeps beside
its numbers), `machine` (describes machine and software), `files` (writes a file completely or not at all).
"""

from ecanet.report import figures, pictures
from ecanet.report.artifacts import Artifacts, DetectionExample, Example, GateSummary
from ecanet.report.files import describe_disk, replace_file, write_file
from ecanet.report.html_page import make_table, page
from ecanet.report.machine import environment
from ecanet.report.report import UNITS, Report

__all__ = [
    "UNITS",
    "Artifacts",
    "DetectionExample",
    "Example",
    "GateSummary",
    "Report",
    "describe_disk",
    "environment",
    "figures",
    "make_table",
    "page",
    "pictures",
    "replace_file",
    "write_file",
]
