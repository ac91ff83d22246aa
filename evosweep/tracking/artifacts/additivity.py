"""Checks whether the sum of layer errors ranks allocations as fitness does, as ILP, DP and greedy assume.

EvoPress starts from the claim that it does not (arXiv 2410.14649, section 3); here it is tested on one's own model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from evosweep.core.events import SearchResult
from evosweep.core.files import write_json

Floats = npt.NDArray[np.float64]
LEAST = 3  # candidates a generation, and of all


@dataclass(frozen=True)
class Sample:
    """Allocations of one generation, scored on the same tokens.

    Attributes:
        sums: Sum of their units' relative layer errors, shape (candidates,).
        fitness: First-stage fitness, shape (candidates,).
    """

    sums: Floats
    fitness: Floats

    def violations(self) -> tuple[int, int]:
        """Return pairs in which the lower sum has the worse fitness, and all pairs that differ in both."""
        rows, columns = np.triu_indices(len(self.sums), 1)
        product = (self.sums[rows] - self.sums[columns]) * (self.fitness[rows] - self.fitness[columns])
        return int((product < 0).sum()), int((product != 0).sum())


class Additivity:
    """Correlation of summed layer errors with fitness, and how often their order differs, generation by generation."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``additivity.json`` and ``additivity.png``; nothing where too few allocations were scored."""
        samples = samples_of(result)
        if not samples:
            return
        figures = statistics(samples)
        write_json(folder / "additivity.json", figures)
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        for sample in samples:
            axis.scatter(
                sample.sums - sample.sums.mean(), sample.fitness - sample.fitness.mean(), s=6, alpha=0.5, color="C0"
            )
        axis.set_xlabel("sum of relative layer errors, less the generation's mean")
        axis.set_ylabel("fitness, less the generation's mean")
        axis.set_title(
            f"Pearson {figures['pearson']:.2f}, Spearman {figures['spearman']:.2f}\n"
            f"{figures['violations_percent']:.0f} % of pairs in the wrong order",
            fontsize=10,
        )
        axis.grid(alpha=0.3)
        figure.savefig(folder / "additivity.png", dpi=120)


def samples_of(result: SearchResult) -> list[Sample]:
    """Return the scored allocations of every generation that has enough of them."""
    problem = result.problem
    if any(level.relative_error is None for unit in problem.units for level in unit.levels):
        return []
    errors = np.zeros(problem.costs.shape)
    for row, unit in enumerate(problem.units):
        errors[row, : len(unit.levels)] = [level.relative_error for level in unit.levels]
    samples = []
    for record in result.generations:
        scored = [candidate for candidate in record.candidates if candidate.scores and candidate.duplicate_of is None]
        first = [one for one in scored if min(one.scores) == 0 and np.isfinite(one.scores[0])]
        if len(first) >= LEAST:
            sums = np.array([errors[problem.indices, one.genome][problem.alive(one.genome)].sum() for one in first])
            samples.append(Sample(sums, np.array([one.scores[0] for one in first])))
    return samples


def statistics(samples: list[Sample]) -> dict[str, float]:
    """Return correlations (generation means removed), and the share of pairs whose order is violated."""
    sums = np.concatenate([sample.sums - sample.sums.mean() for sample in samples])
    fitness = np.concatenate([sample.fitness - sample.fitness.mean() for sample in samples])
    counts = np.array([sample.violations() for sample in samples]).sum(axis=0)
    varied = np.ptp(sums) > 0 and np.ptp(fitness) > 0
    return {
        "allocations": float(len(sums)),
        "pearson": float(pearsonr(sums, fitness).statistic) if varied else 0.0,
        "spearman": float(spearmanr(sums, fitness).statistic) if varied else 0.0,
        "pairs": float(counts[1]),
        "violations_percent": 100.0 * float(counts[0]) / max(float(counts[1]), 1.0),
    }
