"""Networks in other runtimes, and for other people: `ecanet.export`, `ecanet.from_pretrained`, `ecanet.slim`.

Read downward: `hub` (networks on the Hugging Face Hub), `saving` (writes one into a folder), `model_card` (the folder's
README), `quantize` (`quantize`: int8, by `quantize_onnx`, `quantize_openvino` and `quantize_executorch`), `exporting`
(`export`), `checking` (runs a file in its own runtime), `targets` (the table of targets), `onnx_blocked` (ONNX for
ONNX Runtime on CPUs), `onnx_files` (ONNX), `openvino_files`, `executorch_files`, `torch_files` (torch.export and
TorchScript); for `slim`, which folds gates that barely vary into the layers beside them: `slim`, `slim_report` (what
became of each gate), `slim_images` (checks and splits the images), `slim_tune` (makes the constants of several gates
better together), `slim_judge` (which decisions change, without labels), `slim_fit` (the constant that stands for a gate
best); and for all: `programs` (what the targets share), `value_reads` (forwards that read values of the images),
`preparation` (the copy that is exported), `forms` (the operations of a gate), `cbam_form` (those of CBAM), `about`
(what a file says about its images and classes), `reports` (what an export did).
"""

from ecanet.deploy.checking import time_in_turns
from ecanet.deploy.exporting import export
from ecanet.deploy.forms import FORMS, build_gate
from ecanet.deploy.hub import check_repository, from_pretrained, push_to_hub
from ecanet.deploy.model_card import Measured, Metric
from ecanet.deploy.quantize import QUANTIZERS, Int8Report, quantize
from ecanet.deploy.reports import Comparison, ExportReport, Timing
from ecanet.deploy.saving import save_pretrained
from ecanet.deploy.slim import slim
from ecanet.deploy.slim_report import GateReport, SlimReport
from ecanet.deploy.targets import TARGETS

__all__ = [
    "FORMS",
    "QUANTIZERS",
    "TARGETS",
    "Comparison",
    "ExportReport",
    "GateReport",
    "Int8Report",
    "Measured",
    "Metric",
    "SlimReport",
    "Timing",
    "build_gate",
    "check_repository",
    "export",
    "from_pretrained",
    "push_to_hub",
    "quantize",
    "save_pretrained",
    "slim",
    "time_in_turns",
]
