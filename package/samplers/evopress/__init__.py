"""EvoPressSampler for OptunaHub, over the sampler of evosweep."""

from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers.base import known_value, suggest_allocation
from evosweep.samplers.evopress import EvoPressSampler

__all__ = ["EvoPressSampler", "Level", "Problem", "Unit", "known_value", "suggest_allocation"]
