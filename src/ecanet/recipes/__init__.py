"""Recipes: everything that decides a run's result, as frozen values.

Read downward: `named` (`find`, and the recipes themselves), `config` (what a recipe consists of, and its checks).
"""

from ecanet.recipes.config import (
    DataConfig,
    DetectorConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    from_dict,
    parse_kernel_sizes,
    suggestion,
    to_dict,
    with_settings,
)
from ecanet.recipes.named import RECIPES, find

__all__ = [
    "RECIPES",
    "DataConfig",
    "DetectorConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "ScheduleConfig",
    "find",
    "from_dict",
    "parse_kernel_sizes",
    "suggestion",
    "to_dict",
    "with_settings",
]
