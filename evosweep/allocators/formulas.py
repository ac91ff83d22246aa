"""Proxies of an allocation's KL that need no scoring, formulas over them, and the search for the best formula (EMQ).

"EMQ: Evolving Training-free Proxies for Automated Mixed Precision Quantization" (arXiv 2307.10554) searches formulas
over statistics of a network by evolution, and judges each by Spearman's rank correlation with true results on a bench
of scored allocations. Here a proxy is a number for each level of each unit, and an allocation's score is their sum, as
for every other harm, so the winner is minimized within a budget by integer programming. Differs from EMQ in its
primitives, which are of one layer's numbers here instead of whole tensors, in judging by Spearman's correlation on all
allocations of one half of the bench instead of also on its best ones, and in that the best formulas stay. EMQ's
repository has no search; selection follows the one that its authors publish with their later proxies (LPZero).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from evosweep.core.errors import EvosweepError
from evosweep.core.seeds import generator

Table = npt.NDArray[np.float64]
"""Numbers of every (unit, level), shape (units, longest ladder); past a ladder's end they do not count."""
TINY = 1e-12
MONOTONE = 0.8  # share of units whose lowest level must have more harm than their highest
POPULATION = 20
ITERATIONS = 1000
POOL = 0.5  # share of the population, the better one, that parents are drawn from
CROSSOVER = 0.5  # probability that a formula gets a branch of another
MUTATION = 0.5  # probability that a part of it is redrawn
TRIES = 100  # for a formula that passes the screening


@dataclass(frozen=True)
class Bench:
    """Allocations and their true KL.

    Attributes:
        genomes: Level indices, shape (allocations, units).
        kl: Shape (allocations,).
    """

    genomes: npt.NDArray[np.int64]
    kl: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.kl)

    def rows(self, chosen: slice) -> "Bench":
        """Return a bench of those of its allocations that a slice chooses, with their KL."""
        return Bench(self.genomes[chosen], self.kl[chosen])

    def scores(self, table: Table) -> npt.NDArray[np.float64]:
        """Return the sum over units of a table's numbers, of each allocation."""
        scores: npt.NDArray[np.float64] = table[np.arange(self.genomes.shape[1]), self.genomes].sum(axis=1)
        return scores

    def correlation(self, name: str, table: Table) -> float:
        """Return Spearman's rank correlation of a proxy's scores with the KL.

        Args:
            name: Of the proxy.
            table: Its numbers.

        Raises:
            EvosweepError: All allocations have the same score, or one is no number.
        """
        scores = self.scores(table)
        if not np.isfinite(scores).all():
            raise EvosweepError(f"proxy {name} is not a finite number for some of the {len(self)} scored allocations")
        if np.ptp(scores) <= TINY * np.abs(scores).max(initial=0.0):
            raise EvosweepError(f"proxy {name} is constant over the {len(self)} scored allocations: it ranks nothing")
        return float(spearmanr(scores, self.kl).statistic)


def _scaled(x: Table) -> Table:
    return x / (np.abs(x).mean() + TINY)


UNARY: Mapping[str, Callable[[Table], Table]] = {
    "": lambda x: x,
    "log": lambda x: np.log(np.abs(x) + TINY),
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "square": np.square,
    "abs": np.abs,
    "neg": np.negative,
    "inverse": lambda x: 1.0 / (np.abs(x) + TINY),
    "tanh": lambda x: np.tanh(_scaled(x)),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-np.clip(_scaled(x), -50, 50))),
    "exp": lambda x: np.exp(np.clip(_scaled(x), -50, 50)),
    "relu": lambda x: np.maximum(x, 0.0),
    "scaled": _scaled,
    "centred": lambda x: x - x.mean(axis=0, keepdims=True),
    "share": lambda x: x / (np.abs(x).sum(axis=0, keepdims=True) + TINY),
}
BINARY: Mapping[str, Callable[[Table, Table], Table]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": lambda x, y: x / (np.abs(y) + TINY),
    "max": np.maximum,
}


@dataclass(frozen=True)
class Branch:
    """A proxy under two functions of one argument.

    Attributes:
        proxy: Name.
        inner: First function, a key of ``UNARY``.
        outer: Second function.
    """

    proxy: str
    inner: str
    outer: str

    def __str__(self) -> str:
        return _call(self.outer, _call(self.inner, self.proxy))


@dataclass(frozen=True)
class Formula:
    """EMQ's branched structure: two branches, joined by a function of two arguments, under one of one argument.

    Attributes:
        left: First branch.
        right: Second branch.
        joined: A key of ``BINARY``.
        last: A key of ``UNARY``.
    """

    left: Branch
    right: Branch
    joined: str
    last: str

    def __str__(self) -> str:
        pair = f"max({self.left}, {self.right})" if self.joined == "max" else f"{self.left} {self.joined} {self.right}"
        return _call(self.last, pair) if self.last else pair

    def table(self, proxies: Mapping[str, Table]) -> Table:
        """Return its numbers for every (unit, level)."""
        with np.errstate(all="ignore"):
            sides = [
                UNARY[branch.outer](UNARY[branch.inner](proxies[branch.proxy])) for branch in (self.left, self.right)
            ]
            return UNARY[self.last](BINARY[self.joined](*sides))


def _call(function: str, argument: str) -> str:
    return f"{function}({argument})" if function else argument


@dataclass(frozen=True)
class Found:
    """A formula that was found.

    Attributes:
        formula: The formula.
        fitted: Spearman's rank correlation on the allocations that it was chosen by.
        held_out: The same on all other allocations of the bench.
        tried: Formulas that were judged.
    """

    formula: Formula
    fitted: float
    held_out: float
    tried: int

    def __str__(self) -> str:
        return (
            f"emq: {self.formula}; Spearman's correlation with the KL {self.fitted:.3f} on the allocations that chose "
            f"it, {self.held_out:.3f} on others; {self.tried} formulas tried"
        )


class Screening:
    """EMQ's compatibility screening: which formulas are worth judging.

    A formula must be finite for every level, must have more harm at the lowest level than at the highest for most
    units, must not be constant on the bench, and must not rank it as one that is known does.

    Args:
        proxies: Tables by name, finite up to each ladder's end.
        sizes: Length of every unit's ladder.
        bench: Scored allocations.
    """

    def __init__(self, proxies: Mapping[str, Table], sizes: npt.NDArray[np.int64], bench: Bench) -> None:
        self.proxies = proxies
        self.bench = bench
        self._tops = sizes - 1
        self._inside = np.arange(max(sizes))[None] < sizes[:, None]
        self._known: dict[bytes, None] = {}

    def judged(self, formula: Formula) -> float | None:
        """Return a formula's rank correlation with the KL, or None if it is screened out.

        Screened out are formulas that are not finite, that do not fall with bits, or that rank as an earlier one does.
        """
        table = formula.table(self.proxies)
        if not np.isfinite(table[self._inside]).all():
            return None
        units = np.arange(len(table))
        if np.mean(table[units, 0] > table[units, self._tops]) < MONOTONE:
            return None
        ranks = np.argsort(np.argsort(self.bench.scores(table), kind="stable"), kind="stable").astype(np.int16)
        if ranks.tobytes() in self._known:
            return None
        try:
            found = self.bench.correlation(str(formula), table)
        except EvosweepError:
            return None
        self._known[ranks.tobytes()] = None
        return found


def evolved(
    proxies: Mapping[str, Table],
    sizes: npt.NDArray[np.int64],
    bench: Bench,
    *,
    seed: int,
    population: int = POPULATION,
    iterations: int = ITERATIONS,
) -> Found:
    """Return the formula of highest rank correlation that an evolutionary search finds, after EMQ's.

    Every iteration draws two parents from the better half of the population, exchanges branches between them, redraws a
    part, each with an even chance, and also makes a new random formula. The better of the two enters the population,
    the worst of which leaves (diversity-prompting selection). What fails the screening counts as worst.
    Half of the bench chooses; the other half says how well that went.

    Args:
        proxies: Tables by name.
        sizes: Length of every unit's ladder.
        bench: Scored allocations.
        seed: Names all randomness.
        population: Formulas that are kept.
        iterations: Formulas that are made.

    Raises:
        EvosweepError: No formula passes the screening, or the bench is too small.
    """
    if len(bench) < 4:
        raise EvosweepError(f"a formula needs at least 4 scored allocations to be chosen by; there are {len(bench)}")
    rng = generator(seed, "emq")
    screening = Screening(proxies, sizes, bench.rows(slice(0, None, 2)))
    names = sorted(proxies)
    ranked: list[tuple[float, Formula]] = []
    for _ in range(population * TRIES):
        if len(ranked) == population:
            break
        ranked += _passed(screening, [_random(names, rng)])
    tried = len(ranked)
    ranked.sort(key=lambda pair: -pair[0])
    for _ in range(iterations if ranked else 0):
        passed = _passed(screening, [_offspring(ranked, names, rng), _random(names, rng)])
        tried += len(passed)
        best = max(passed, key=lambda pair: pair[0], default=None)
        if best is not None:
            ranked = sorted([*ranked, best], key=lambda pair: -pair[0])[:population]
    if not ranked:
        raise EvosweepError(
            "no formula of proxies passes EMQ's screening: none falls from the lowest level to the highest"
        )
    score, winner = ranked[0]
    held_out = bench.rows(slice(1, None, 2)).correlation(str(winner), winner.table(proxies))
    return Found(winner, score, held_out, tried)


def _passed(screening: Screening, formulas: Sequence[Formula]) -> list[tuple[float, Formula]]:
    """Return the formulas that pass the screening, each with its rank correlation."""
    judged = [(screening.judged(formula), formula) for formula in formulas]
    return [(score, formula) for score, formula in judged if score is not None]


def _offspring(ranked: Sequence[tuple[float, Formula]], names: Sequence[str], rng: np.random.Generator) -> Formula:
    """Return a formula made of two parents of the better half.

    Args:
        ranked: The population with its scores, best first.
        names: Of the proxies.
        rng: Makes all choices.
    """
    better = max(1, int(POOL * len(ranked)))
    first, second = (ranked[int(index)][1] for index in rng.integers(better, size=2))
    if rng.random() < CROSSOVER:
        first = replace(first, right=second.right if rng.random() < 0.5 else second.left)
    return _mutated(first, names, rng) if rng.random() < MUTATION else first


def _mutated(formula: Formula, names: Sequence[str], rng: np.random.Generator) -> Formula:
    """Return a formula with one of its four parts redrawn."""
    fresh = _random(names, rng)
    part = int(rng.integers(4))
    if part == 0:
        return replace(formula, left=_mutated_branch(formula.left, fresh.left, rng))
    if part == 1:
        return replace(formula, right=_mutated_branch(formula.right, fresh.right, rng))
    return replace(formula, joined=fresh.joined) if part == 2 else replace(formula, last=fresh.last)


def _mutated_branch(branch: Branch, fresh: Branch, rng: np.random.Generator) -> Branch:
    """Return a branch with one of its three parts from another.

    Args:
        branch: What is changed.
        fresh: Where the part is from.
        rng: Chooses the part.
    """
    part = int(rng.integers(3))
    if part == 0:
        return replace(branch, proxy=fresh.proxy)
    return replace(branch, inner=fresh.inner) if part == 1 else replace(branch, outer=fresh.outer)


def _random(names: Sequence[str], rng: np.random.Generator) -> Formula:
    functions = list(UNARY)

    def branch() -> Branch:
        inner, outer = (functions[int(index)] for index in rng.integers(len(functions), size=2))
        return Branch(names[int(rng.integers(len(names)))], inner, outer)

    joined = list(BINARY)[int(rng.integers(len(BINARY)))]
    return Formula(branch(), branch(), joined, functions[int(rng.integers(len(functions)))])
