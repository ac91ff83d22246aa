"""Additive models of harm, shared by ILP, dynamic programming and greedy: an estimate for every level of every unit."""

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.core.checks import check_choice
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Problem

KL_PER_ERROR = "kl_per_error"
AROUND_UNIFORM = "kl_around_uniform"
AROUND_TOP = "kl_around_top"
HAWQ = "hawq_v2"
HAWQ_HUTCHINSON = "hawq_v2_hutchinson"
HAWQ_TOP = "hawq"
ORDER = "_order"  # what a curvature's column is called whose numbers are a unit's, not a level's
FISHER = "fisher"
AUTO_QUANTIZE = "auto_quantize"
AUTO_SCHEME = "auto_scheme"
HIGGS = "higgs"
HIGGS_DATA = "higgs_data"
EMQ = "emq"
LEAST_RISE = 1e-6
BROKEN = 1e3  # KL of a level whose KL is no number

COLUMNS: dict[str, list[str]] = {
    "scaled": [KL_PER_ERROR],
    "bare": [],
    "around_uniform": [AROUND_UNIFORM],
    "around_top": [AROUND_TOP],
    "hawq_v2": [HAWQ],
    "hawq_v2_hutchinson": [HAWQ_HUTCHINSON],
    "hawq": [HAWQ_TOP],
    "fisher": [FISHER],
    "auto_quantize": [AUTO_QUANTIZE],
    "auto_scheme": [AUTO_SCHEME],
    "higgs": [HIGGS],
    "higgs_data": [HIGGS_DATA],
    "emq": [EMQ],
}
OF_LAYERS = ("scaled", "bare")  # kinds that read layer errors
OF_WEIGHTS = tuple(kind for kind in COLUMNS if kind not in (*OF_LAYERS, "around_uniform", "around_top"))
"""Kinds that ask what a level changes in a weight."""
DEFAULT = "around_top"  # the best of them on what was measured, see benchmarks/README.md


class Harm:
    """A model of the harm that every level of every unit does to the whole model.

    Args:
        kind: ``around_top``: by how much the KL rises where only that unit takes that level, all others at their
            best, at least 1e-6: the integer-programming formulation of end-to-end losses, and of output distortions.
            ``around_uniform``: the same with all others at the budget's uniform allocation. ``scaled``: layer error x
            KL per layer error, one measurement a unit instead of one a level. ``bare``: layer error alone, what SPDY
            minimizes; it can be worse than uniform. ``hawq_v2``: mean curvature of the loss in a layer's weights x
            what the level changes in them (HAWQ-V2); ``hawq_v2_hutchinson``: the same by Hutchinson's estimate;
            ``hawq``: top eigenvalue instead (HAWQ). ``fisher``: that change's KL to second order, from gradients.
            ``auto_quantize``, ``auto_scheme``: what NVIDIA ModelOpt and Intel AutoRound sum over gradients.
            ``higgs``: HIGGS's linearity model, squared relative error of the weight x the slope that noise shows on
            random tokens; ``higgs_data``: on text. ``emq``: what the formula of training-free proxies gives that ranks
            some scored allocations best (EMQ).

    Raises:
        SettingError: There is no such kind.
    """

    def __init__(self, kind: str = DEFAULT) -> None:
        self.kind = check_choice("harm", kind, COLUMNS)
        self.columns = COLUMNS[self.kind]

    def named(self, allocator: str) -> str:
        """Return the name of an allocator that uses it."""
        return allocator if self.kind == DEFAULT else f"{allocator}_{self.kind}"

    def check(self, problem: Problem, *, owner: object = None) -> None:
        """Raise a SettingError if units can be dropped: they have no layer error, and no weight of their own."""
        weightless = self.kind in OF_WEIGHTS and bool(problem.gating.any())
        if weightless or (not problem.least and not problem.gated and self.kind in (*OF_LAYERS, *OF_WEIGHTS)):
            raise SettingError(
                "harm",
                owner=owner,
                allowed=["around_top", "around_uniform"],
                got=self.kind,
                hint="units that are kept or dropped have no layer error, and no weight of their own",
            )

    def table(self, problem: Problem) -> npt.NDArray[np.float64]:
        """Return the harm of every (unit, level), shape (units, longest ladder); past a ladder's end, infinity.

        Raises:
            EvosweepError: A level has no layer error, or the harm of weights is no number, or the same for all levels.
            StoreError: A column was not measured.
        """
        if self.kind in OF_LAYERS:
            scale = np.ones(len(problem.units)) if self.kind == "bare" else column(problem, KL_PER_ERROR)
            return scale[:, None] * _layer_errors(problem)
        table = np.full(problem.costs.shape, np.inf)
        for level in range(problem.costs.shape[1]):
            has = np.flatnonzero(problem.sizes > level)
            names = [f"{self.columns[0]}/{problem.units[index].levels[level].name}" for index in has]
            table[has, level] = [
                column(problem, name, only=[index])[0] for index, name in zip(has.tolist(), names, strict=True)
            ]
        if self.kind in OF_WEIGHTS:
            self._check(problem, table)
        return np.maximum(table, LEAST_RISE) if self.kind == "around_top" else table

    def _check(self, problem: Problem, table: npt.NDArray[np.float64]) -> None:
        """Raise EvosweepError where a table prefers no level, as one of gradients that overflow or vanish."""
        inside = np.arange(table.shape[1]) < problem.sizes[:, None]
        broken = np.flatnonzero((inside & ~np.isfinite(table)).any(axis=1))
        if len(broken):
            name = problem.units[broken[0]].name
            raise EvosweepError(
                f"harm {self.kind} of {name} is not a finite number ({len(broken)} of {len(table)} units): "
                "its gradients overflow; try another model.dtype, as model.dtype=float32"
            )
        if (problem.sizes > 1).any() and (np.where(inside, table, table[:, :1]) == table[:, :1]).all():
            raise EvosweepError(f"harm {self.kind} is the same at all levels of every unit: it prefers none")


def _layer_errors(problem: Problem) -> npt.NDArray[np.float64]:
    lacking = [(unit.name, level.name) for unit in problem.units for level in unit.levels if level.error is None]
    if lacking:
        unit, name = lacking[0]
        raise EvosweepError(
            f"this sampler needs the layer error of every level; {len(lacking)} have none ({name} of {unit} ...): "
            "store.layer_errors=true measures them"
        )
    table = np.full(problem.costs.shape, np.inf)
    for row, one in enumerate(problem.units):
        table[row, : len(one.levels)] = np.array([level.error for level in one.levels], dtype=np.float64)
    return table
