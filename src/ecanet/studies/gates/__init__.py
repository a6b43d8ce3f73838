"""Show how the gates of a trained network behave.

Read downward: `pages` (`run`, and the files that it writes), `inspection` (what is recorded of classifiers and of
detectors), `drawings` (figures), `cams` (class-activation maps with gates and without). `ecanet.attention` records what
gates compute, and finds what looks wrong.
"""

from ecanet.studies.gates.cams import explain, find_layer, measure_scales, switch_gates_off
from ecanet.studies.gates.pages import list_rows, run, to_json

__all__ = ["explain", "find_layer", "list_rows", "measure_scales", "run", "switch_gates_off", "to_json"]
