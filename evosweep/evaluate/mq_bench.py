"""A bench of scored allocations, as a file: what proxies are compared on, and EMQ's formulas are chosen by."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep.allocators.formulas import Bench
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.search.moves import exchange, random_feasible

VERSION = 1
ANYWHERE = 0.25  # share of the allocations that are drawn from all there are


def bench_genomes(problem: Problem, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return different allocations that spend the budget, shape (at most count, units).

    The first is the uniform one; most others are it after some exchanges, one to as many as there are units, so that
    good and bad allocations are there; a quarter are random ones.

    Args:
        problem: Units, ladders, budget.
        count: Allocations that are asked for; a small problem may have fewer.
        seed: Chooses them.
    """
    found: dict[bytes, Genome] = {}
    uniform = problem.uniform()
    found[uniform.tobytes()] = uniform
    for draw in range(20 * count):
        if len(found) >= count:
            break
        rng = generator(seed, "mq_bench", draw)
        if rng.random() < ANYWHERE:
            genome = random_feasible(problem, rng)
        else:
            genome = uniform.copy()
            for _ in range(int(np.ceil(len(genome) ** rng.random()))):
                exchange(problem, genome, rng)
        found.setdefault(genome.tobytes(), genome)
    return np.stack(list(found.values()))


def write_bench(path: Path, problem: Problem, bench: Bench, **facts: Any) -> Path:
    """Write a bench as JSON: units, their levels, allocations as level indices, their KL.

    Args:
        path: Of the file.
        problem: Units and levels.
        bench: Scored allocations.
        **facts: Further entries.
    """
    return write_json(
        path,
        {
            "version": VERSION,
            "units": [unit.name for unit in problem.units],
            "levels": [list(unit.level_names) for unit in problem.units],
            "allocations": bench.genomes.tolist(),
            "kl": bench.kl.tolist(),
            **facts,
        },
    )


def read_bench(path: Path, problem: Problem) -> Bench:
    """Return the bench in a file; allocations without a finite KL are left out.

    Args:
        path: Of the file.
        problem: Units and levels that it must be of.

    Raises:
        SettingError: It cannot be read, or is of other units or levels.
    """
    genomes, kl, units = _entries(path)
    mine = {unit.name: list(unit.level_names) for unit in problem.units}
    for name in [*mine, *units]:
        if mine.get(name) != units.get(name):
            ours = "no such unit" if name not in mine else f"levels {', '.join(mine[name])}"
            theirs = "no such unit" if name not in units else f"levels {', '.join(units[name])}"
            raise _refused(path, f"{path} is a bench of another problem: {name} has {theirs} there, {ours} here")
    order = [list(units).index(unit.name) for unit in problem.units]
    finite = np.isfinite(kl)
    return Bench(genomes[finite][:, order], kl[finite])


def check_bench(path: Path, units: Iterable[str]) -> None:
    """Raise SettingError where a file is no bench of units of these names; which levels they have is known later."""
    _, _, there = _entries(path)
    other = set(units) ^ set(there)
    if other:
        raise _refused(path, f"{path} is a bench of another problem: {min(other)} is a unit of only one of both")


def _entries(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], dict[str, list[str]]]:
    """Return a file's allocations, their KL, and the levels of its units by name.

    Raises:
        SettingError: It cannot be read, or has another form.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        genomes = np.array(value["allocations"], dtype=np.int64)
        kl = np.array([np.nan if one is None else one for one in value["kl"]], dtype=np.float64)
        units = dict(zip(value["units"], value["levels"], strict=True))
        whole = value["version"] == VERSION and genomes.shape == (len(kl), len(units)) and len(kl) > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} is no bench of scored allocations: {type(error).__name__}: {error}"
        raise _refused(path, reason) from error
    if not whole:
        raise _refused(path, f"{path} is no bench of scored allocations of version {VERSION}")
    return genomes, kl, units


def _refused(path: Path, reason: str) -> SettingError:
    allowed = "a file of scored allocations of this model's units"
    return SettingError("evaluate.mq_bench", allowed=allowed, got=str(path), hint=reason)
