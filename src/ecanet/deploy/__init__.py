"""Networks in other runtimes: `ecanet.export`.

Read downward: `exporting` (`export`), `checking` (runs a file in its own runtime), `targets` (the table of targets),
`onnx_files` (ONNX), `torch_files` (torch.export and TorchScript), `programs` (what the targets share), `preparation`
(the copy that is exported), `forms` (the operations of a gate), `about` (what a file says about its images and
classes), `reports` (what an export did).
"""

from ecanet.deploy.checking import time_in_turns
from ecanet.deploy.exporting import export
from ecanet.deploy.forms import FORMS, build_gate
from ecanet.deploy.reports import Comparison, ExportReport, Timing
from ecanet.deploy.targets import TARGETS

__all__ = ["FORMS", "TARGETS", "Comparison", "ExportReport", "Timing", "build_gate", "export", "time_in_turns"]
