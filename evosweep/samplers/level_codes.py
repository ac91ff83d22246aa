"""The levels of a whole allocation as one short string, decoded with attributes of its study."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from evosweep.core.allocation import Allocation
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Genome, Problem

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
LEVELS = "levels"  # trial attribute: the levels as text
UNITS = "units"  # study attribute: index of every unit's ladder
LADDERS = "ladders"  # study attribute: level names of every ladder


def written(problem: Problem, genome: Genome) -> str:
    """Return a genome as text: the level index of every unit in base 36, in the problem's order."""
    width = _width(int(problem.sizes.max()))
    text = []
    for level in genome.tolist():
        digits = ""
        rest = level
        for _ in range(width):
            rest, digit = divmod(rest, len(DIGITS))
            digits = DIGITS[digit] + digits
        text.append(digits)
    return "".join(text)


def key(problem: Problem) -> dict[str, Any]:
    """Return the study attributes that ``allocation_of`` reads: units in order, and their ladders."""
    ladders = list(dict.fromkeys(unit.level_names for unit in problem.units))
    return {
        UNITS: {unit.name: ladders.index(unit.level_names) for unit in problem.units},
        LADDERS: [list(names) for names in ladders],
    }


def allocation_of(study: optuna.Study, trial: FrozenTrial) -> Allocation:
    """Return the allocation of a trial of a recorded search.

    Raises:
        EvosweepError: The study or the trial holds no levels.
    """
    attributes: Mapping[str, Any] = study.user_attrs
    text = trial.user_attrs.get(LEVELS)
    if text is None or UNITS not in attributes or LADDERS not in attributes:
        raise EvosweepError(f"trial {trial.number} of study {study.study_name!r} was not recorded with its levels")
    units = attributes[UNITS]
    ladders = attributes[LADDERS]
    width = _width(max(len(ladders[ladder]) for ladder in units.values()))
    indices = [int(text[start : start + width], len(DIGITS)) for start in range(0, len(text), width)]
    return Allocation(
        {name: ladders[ladder][index] for (name, ladder), index in zip(units.items(), indices, strict=True)}
    )


def _width(levels: int) -> int:
    """Return the digits that the longest ladder needs."""
    return len(np.base_repr(max(levels - 1, 1), len(DIGITS)))
