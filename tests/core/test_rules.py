import itertools

import numpy as np
import pytest

from evosweep.core.errors import SettingError
from evosweep.core.problem import Problem
from evosweep.core.rules import Rules, limited
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.testing.problems import make_problem


def ladders(rules: Rules, ties=()) -> dict[str, tuple[str, ...]]:
    return dict(rules.ladders(make_problem().units, ties))


def test_a_level_is_named_or_numbered_and_limits_the_units_that_a_pattern_matches() -> None:
    found = ladders(Rules(fix={"linear_0": 3}, min={"blocks.1.*": "3bit"}, max={"linear_[02]": 3}))
    assert found == {
        **{f"blocks.{block}.linear_0": ("3bit",) for block in range(4)},
        **{f"blocks.{block}.linear_2": ("2bit", "3bit") for block in (0, 2, 3)},
        "blocks.1.linear_1": ("3bit", "4bit"),
        "blocks.1.linear_2": ("3bit",),
    }


def test_a_limited_problem_has_the_allocations_that_keep_the_rules() -> None:
    units = make_problem().units[:4]
    rules = Rules(fix={"blocks.0.linear_1": 2}, min={"linear_0": 3})
    problem = Problem(units=limited(units, rules.ladders(units)), budget=2000)
    whole = Problem(units=units, budget=2000)
    kept = {
        problem.decode(np.array(genome))
        for genome in itertools.product(*(range(size) for size in problem.sizes))
        if problem.feasible(np.array(genome))
    }
    every = (np.array(genome) for genome in itertools.product(range(3), repeat=4))
    wanted = {whole.decode(g) for g in every if whole.feasible(g) and g[0] >= 1 and g[1] == 0 and g[3] >= 1}
    assert kept == wanted and len(kept) > 1


def test_tied_layers_keep_the_rules_of_each_of_them() -> None:
    tie = ("blocks.0.linear_0", "blocks.0.linear_1")
    found = ladders(Rules(min={"blocks.0.linear_0": 3}, max={"blocks.0.linear_1": 3}), [tie])
    assert found == dict.fromkeys(tie, ("3bit",))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules(fix={"linear_9": 3}), ["fix[linear_9] must be a pattern that matches a unit", "did you mean 'linear_"]),
        (Rules(fix={"linear_0": 7}), ["fix[linear_0] must be one of 2bit, 3bit, 4bit, got 7", "blocks.0.linear_0"]),
        (Rules(min={"linear_0": 4}, max={"blocks.2.*": 3}), ["blocks.2.linear_0", "min[linear_0]=4", "contradict"]),
        (Rules(fix={"linear_0": 4, "blocks.1.*": 3}), ["blocks.1.linear_0", "fix[linear_0]=4 and fix[blocks.1.*]=3"]),
    ],
)
def test_rules_that_do_not_fit_are_named_in_one_line(rules: Rules, words: list[str]) -> None:
    with pytest.raises(SettingError) as error:
        ladders(rules)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_rules_about_ties_that_contradict_each_other_are_named() -> None:
    tie = ("blocks.0.linear_0", "blocks.0.linear_1")
    with pytest.raises(SettingError, match=r"fix\[linear_0\]=2 and min\[linear_1\]=3'?; they contradict"):
        ladders(Rules(fix={"linear_0": 2}, min={"linear_1": 3}), [tie])


@pytest.mark.parametrize("value", [{"exclude": "linear_0"}, {"fix": ["linear_0"]}, {"min": {"linear_0": True}}])
def test_malformed_rules_are_refused(value: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(value))):
        Rules(**value)


def test_excluded_names_are_those_that_patterns_match() -> None:
    names = {f"blocks.{block}.{kind}": kind for block in range(2) for kind in ("up", "down")}
    assert Rules(["down", "blocks.1.*"]).excluded(names) == {"blocks.0.down", "blocks.1.down", "blocks.1.up"}
    with pytest.raises(SettingError, match=r"exclude\[0\].*did you mean 'down'"):
        Rules(["dwn"]).excluded(names)
    with pytest.raises(SettingError, match="leave a unit"):
        Rules(["*"]).excluded(names)


def test_a_module_that_can_be_dropped_is_kept_by_exclusion_alone() -> None:
    kept = [Level("dropped", 0, nominal=Nominal("kept", 0)), Level("kept", 10, nominal=Nominal("kept", 1))]
    gate = Unit("blocks.0", 5, 0, tuple(kept), gates=("blocks.0.linear_0",))
    with pytest.raises(SettingError, match="exclude keeps it"):
        Rules(fix={"blocks.0": "kept"}).ladders([gate])
    assert Rules(fix={"blocks.0": "dropped"}).ladders([gate]) == {"blocks.0": ("dropped",)}
