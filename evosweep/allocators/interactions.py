"""A quadratic model of harm: single effects of units, and interactions between groups of them.

CLADO (Deng et al., arXiv 2307.05657) expands the loss to second order in the errors that levels make:
L(x) = Σ_u h_u(x_u) + Σ_{u<v} Ω_uv(x_u, x_v), with Ω_uv = L(u, v) − L(u) − L(v) + L(none), where L(u, v) is the loss
with only u and v compressed. Measured here are pairs of groups (blocks, or kinds of layers) instead of pairs of units.
What a group's interaction is to its units follows from the same expansion: with h_u = ½ d_uᵀ H_uu d_u, the term of a
pair is d_uᵀ H_uv d_v = 2 ρ_uv √(h_u h_v), and ρ is taken to be the same for all units of a pair of groups.

Differs from CLADO, which measures every pair of layers at every pair of levels (half of both terms, as its code has
them, is the same objective), in that groups are measured at the uniform allocation; as in CLADO, the matrix is made
positive semidefinite. CoopQ (Zhao et al., arXiv 2509.15455) has the same quadratic objective for 2 and 4 bits, with
singles and pairs from Shapley values of progressively quantized models, which average over what else is quantized.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evosweep.allocators.base import column
from evosweep.allocators.harm import AROUND_TOP, LEAST_RISE, Harm
from evosweep.core.checks import check_choice
from evosweep.core.problem import Genome, Problem

Floats = npt.NDArray[np.float64]
PAIRS = {"blocks": "kl_pairs_blocks", "kinds": "kl_pairs_kinds"}
ALL = "all"  # of the column: everything at the uniform allocation at once
COLUMNS = [AROUND_TOP]


def group_labels(problem: Problem, grouping: str) -> list[str]:
    """Return the group that each unit is in: its block's number, or its kind.

    Args:
        problem: Units.
        grouping: ``blocks`` or ``kinds``.
    """
    check_choice("group", grouping, PAIRS)
    return [str(unit.block) if grouping == "blocks" else unit.kind for unit in problem.units]


def pair_columns(grouping: str) -> list[str]:
    """Return the columns that ``Interactions.of`` reads."""
    return [*COLUMNS, PAIRS[grouping]]


@dataclass(frozen=True)
class Interactions:
    """A quadratic model of harm.

    Attributes:
        harms: Single effect of every level, at least 1e-6, shape (units, longest ladder); infinity past its end.
        groups: Index of every unit's group, shape (units,).
        matrix: ρ of every pair of groups, symmetric, positive semidefinite, shape (groups, groups).
        labels: Names of the groups.
        measured: Rise of the loss of each group alone, shape (groups,), of pairs beyond their sum, shape (groups,
            groups), and of all groups at once.
    """

    harms: Floats
    groups: npt.NDArray[np.int64]
    matrix: Floats
    labels: tuple[str, ...]
    measured: tuple[Floats, Floats, float]

    @classmethod
    def of(cls, problem: Problem, grouping: str) -> "Interactions":
        """Return the model that the columns of a problem's units describe.

        Args:
            problem: Units with the columns ``pair_columns`` names, measured at the uniform allocation.
            grouping: ``blocks`` or ``kinds``.

        Raises:
            StoreError: A column was not measured.
        """
        names = group_labels(problem, grouping)
        labels = tuple(dict.fromkeys(names))
        groups = np.array([labels.index(name) for name in names])
        first = [names.index(label) for label in labels]
        name = PAIRS[grouping]
        table = np.array([[column(problem, f"{name}/{label}", only=[unit])[0] for label in labels] for unit in first])
        whole = float(column(problem, f"{name}/{ALL}", only=[0])[0])
        harms = Harm("around_top").table(problem)
        alone = np.diag(table).copy()
        beyond = table - np.diag(alone)
        matrix = positive(_correlations(harms, problem.uniform(), groups, alone, beyond))
        return cls(harms, groups, matrix, labels, (alone, beyond, whole))

    @property
    def linear(self) -> Floats:
        """The part of the model that is linear in the choice of levels, shape as ``harms``."""
        return self.harms * (1 - np.diag(self.matrix)[self.groups])[:, None]

    @property
    def roots(self) -> Floats:
        """Square roots of the single effects, 0 past a ladder's end, shape as ``harms``."""
        return np.sqrt(np.where(np.isfinite(self.harms), self.harms, 0.0))

    def sums(self, genome: Genome) -> Floats:
        """Return Σ √h over the units of each group, shape (groups,)."""
        roots = self.roots[np.arange(len(genome)), genome]
        return np.bincount(self.groups, roots, minlength=len(self.labels)).astype(np.float64)

    def value(self, genome: Genome) -> float:
        """Return the harm of a genome: Σ_u h_u (1 − ρ_gg) + Sᵀ ρ S, S the groups' sums of √h."""
        sums = self.sums(genome)
        return float(self.linear[np.arange(len(genome)), genome].sum() + sums @ self.matrix @ sums)


def _correlations(
    harms: Floats, lowered: Genome, groups: npt.NDArray[np.int64], alone: Floats, beyond: Floats
) -> Floats:
    """Return ρ of every pair of groups, within -1 and 1, shape (groups, groups).

    Args:
        harms: Single effects.
        lowered: Level of every unit in the measurement.
        groups: Index of every unit's group.
        alone: Rise of the loss of each group alone.
        beyond: Of pairs of groups beyond the sum of the two.
    """
    single = harms[np.arange(len(lowered)), lowered]
    single = np.where(single > LEAST_RISE, single, 0.0)
    roots = np.bincount(groups, np.sqrt(single))
    inside = roots**2 - np.bincount(groups, single)  # 2 Σ_{u<v} √(h_u h_v)
    scales = 2 * np.outer(roots, roots)
    matrix = np.divide(beyond, scales, out=np.zeros_like(beyond), where=scales > 0)
    own = np.divide(
        alone - np.bincount(groups, single), inside, out=np.zeros_like(alone), where=inside > LEAST_RISE * 1e-3
    )
    np.fill_diagonal(matrix, own)
    return np.clip(matrix, -1.0, 1.0)


def positive(matrix: Floats) -> Floats:
    """Return the nearest positive semidefinite matrix (as CLADO does): negative eigenvalues become 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    clipped: Floats = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return (clipped + clipped.T) / 2


@dataclass(frozen=True)
class Additivity:
    """How far effects add up, all units at the uniform allocation: rises of the loss over the best levels.

    Attributes:
        units: Sum of the effects of single units.
        groups: Sum of the effects of groups, each measured as a whole.
        pairs: That sum and the interactions of all pairs of groups.
        measured: All at once.
        strongest: The pair of groups with the largest interaction.
        interaction: Of that pair.
    """

    units: float
    groups: float
    pairs: float
    measured: float
    strongest: tuple[str, str]
    interaction: float

    @classmethod
    def of(cls, problem: Problem, model: Interactions) -> "Additivity":
        """Return the report of a model's measurements."""
        alone, beyond, whole = model.measured
        single = model.harms[problem.indices, problem.uniform()]
        row, other = np.unravel_index(int(np.abs(beyond).argmax()), beyond.shape)
        return cls(
            units=float(np.where(single > LEAST_RISE, single, 0.0).sum()),
            groups=float(alone.sum()),
            pairs=float(alone.sum() + np.triu(beyond, 1).sum()),
            measured=whole,
            strongest=(model.labels[row], model.labels[other]),
            interaction=float(beyond[row, other]),
        )

    @property
    def facts(self) -> dict[str, float]:
        """Its figures as a run logs them."""
        return {f"additivity/{name}": getattr(self, name) for name in ("units", "groups", "pairs", "measured")} | {
            "additivity/strongest_pair": self.interaction
        }
