"""Reads the allocation of a recorded trial: one short string, decoded with attributes of its study."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from evosweep.core.allocation import Allocation
from evosweep.core.errors import EvosweepError
from evosweep.core.genomes import DIGITS, digits_of
from evosweep.core.problem import Problem

LEVELS = "levels"  # trial attribute: the levels as text
UNITS = "units"  # study attribute: index of every unit's ladder
LADDERS = "ladders"  # study attribute: level names of every ladder


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
    width = digits_of(max(len(ladders[ladder]) for ladder in units.values()))
    indices = [int(text[start : start + width], len(DIGITS)) for start in range(0, len(text), width)]
    return Allocation(
        {name: ladders[ladder][index] for (name, ladder), index in zip(units.items(), indices, strict=True)}
    )
