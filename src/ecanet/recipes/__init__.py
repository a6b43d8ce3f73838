"""Recipes: all settings that decide the result of a run, as frozen values.

Read downward: `named` (`find`, and the recipes themselves), `settings` (a recipe as a dictionary, changes by dotted
names), `config` (a recipe), `groups` (the groups of its settings), `checks` (the base class of all settings),
`json_files` (reads JSON).
"""

from ecanet.recipes.checks import Config, Limits, suggestion
from ecanet.recipes.config import Recipe
from ecanet.recipes.groups import (
    CheckpointConfig,
    DataConfig,
    DetectorConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    has_photographs,
)
from ecanet.recipes.json_files import parse_json, read_json
from ecanet.recipes.named import RECIPES, find
from ecanet.recipes.settings import from_dict, parse_kernel_sizes, to_dict, with_settings

__all__ = [
    "RECIPES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DetectorConfig",
    "Limits",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "ScheduleConfig",
    "find",
    "from_dict",
    "has_photographs",
    "parse_json",
    "parse_kernel_sizes",
    "read_json",
    "suggestion",
    "to_dict",
    "with_settings",
]
