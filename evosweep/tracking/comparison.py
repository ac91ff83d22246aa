"""Comparison of searches: means over seeds, and whether a lead exceeds the noise between seeds."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from evosweep.tracking.significance import BY_WINDOW, NO_DIFFERENCE, paired

Row = Mapping[str, Any]
EXPLAINED = (
    "One line a sampler and budget, sorted by mean validation KL (nats per token) within a budget; ± is the standard "
    "deviation over seeds. p: Welch's t-test of the KLs against the best line. Validation never selects: every winner "
    "was chosen by its score on search tokens."
)
EXPLAINED_NOISE = (
    "Search sd: between searches on the same calibration windows. Calibration sd: between calibrations (tokens.seed), "
    "without what the searches' spread adds. p is then of a paired t test on means over searches, a pair a calibration."
)
CALIBRATION = "calibration_seed"  # entry of a result: tokens.seed
DIGEST = 6  # characters of an identity that a name shows
NOISE = 0.05  # level of Welch's test; what is above it may be the seeds


@dataclass(frozen=True)
class Noise:
    """Standard deviations of KL, from a one-way analysis of variance with calibration seeds as groups.

    Attributes:
        search: Between searches on the same calibration windows; None where no calibration has two.
        calibration: Between calibrations, without what the searches' own spread adds; None for a single one.
    """

    search: float | None
    calibration: float | None


@dataclass(frozen=True)
class Entry:
    """The results of one configuration over its seeds.

    Attributes:
        name: The sampler, and what else was overridden for it alone.
        budget: As the user wrote it.
        rows: Results, one a seed.
    """

    name: str
    budget: str
    rows: tuple[Row, ...]

    def mean(self, key: str) -> float:
        """Return the mean of a figure over seeds."""
        return float(np.mean([row[key] for row in self.rows]))

    def sd(self, key: str) -> float | None:
        """Return its standard deviation over seeds; none for a single one."""
        return float(np.std([row[key] for row in self.rows], ddof=1)) if len(self.rows) > 1 else None

    @property
    def by_calibration(self) -> dict[int, list[float]]:
        """KL of the results by the seed that drew their calibration windows."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            found.setdefault(int(row.get(CALIBRATION, 0)), []).append(float(row["kl"]))
        return found

    @property
    def noise(self) -> Noise:
        """How much of the spread of KL comes from the search's seed, and how much from calibration's."""
        groups = [np.asarray(group) for group in self.by_calibration.values()]
        repeated = [group for group in groups if len(group) > 1]
        freedom = sum(len(group) - 1 for group in repeated)
        within = sum(float(((group - group.mean()) ** 2).sum()) for group in repeated) / freedom if freedom else None
        if len(groups) < 2:
            return Noise(search=None if within is None else within**0.5, calibration=None)
        between = float(np.var([group.mean() for group in groups], ddof=1))
        if within is not None:  # a mean over few searches varies by these, too
            between -= within * float(np.mean([1 / len(group) for group in groups]))
        return Noise(search=None if within is None else within**0.5, calibration=max(between, 0.0) ** 0.5)


def entries(rows: Sequence[Row]) -> list[Entry]:
    """Return results grouped by their settings without the seed, best mean validation KL first within a budget.

    Results with equal ``identity`` are one entry, whatever their experiments are called; others never are. Results
    without one, of the Python interface, are grouped by budget, sampler and overrides.
    """
    shared = set.intersection(*(set(_overrides(row)) for row in rows))
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        settings = (row["budget"], row["sampler"], *_overrides(row))
        groups.setdefault(row.get("identity") or settings, []).append(row)
    found = _named([Entry(_name(members, shared), members[0]["budget"], tuple(members)) for members in groups.values()])
    sizes = {
        budget: min(entry.mean("bits_per_weight") for entry in found if entry.budget == budget)
        for budget in {entry.budget for entry in found}
    }
    return sorted(found, key=lambda entry: (sizes[entry.budget], entry.budget, entry.mean("kl")))


def _overrides(row: Row) -> Sequence[str]:
    return row.get("overrides") or []


def _name(rows: Sequence[Row], shared: set[str]) -> str:
    """Return the sampler and the overrides that all of an entry's results have, but not all results."""
    own = set.intersection(*(set(_overrides(row)) for row in rows)) - shared
    words = [word for word in _overrides(rows[0]) if word in own and not word.startswith("budget")]
    return " ".join([rows[0]["sampler"], *words])


def _named(found: Sequence[Entry]) -> list[Entry]:
    """Return entries with different names: those of equal ones get their experiment's, or a digest of settings."""
    count = Counter((entry.budget, entry.name) for entry in found)
    experiments = Counter((entry.budget, entry.name, entry.rows[0].get("name")) for entry in found)
    named = []
    for entry in found:
        row = entry.rows[0]
        if count[entry.budget, entry.name] > 1:
            alone = row.get("name") and experiments[entry.budget, entry.name, row["name"]] == 1
            label = row["name"] if alone else str(row.get("identity"))[:DIGEST]
            entry = replace(entry, name=f"{entry.name} ({label})")  # noqa: PLW2901
        named.append(entry)
    return named


def verdict(entry: Entry, best: Entry) -> str:
    """Return whether an entry is behind the best one at its budget, or within seed noise of it."""
    if entry is best:
        return "best"
    shared = sorted(set(entry.by_calibration) & set(best.by_calibration))
    if len(shared) > 1:
        return _over_calibrations(entry, best, shared)
    if len(entry.rows) < 2 or len(best.rows) < 2:
        return _over_windows(entry, best)
    ours, theirs = ([row["kl"] for row in side.rows] for side in (entry, best))
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return "behind" if ours[0] > theirs[0] else "equal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them may not vary at all, and the test says so
        chance = float(ttest_ind(ours, theirs, equal_var=False).pvalue)
    return f"behind (p = {chance:.2g})" if chance < NOISE else f"within seed noise (p = {chance:.2g})"


def _over_calibrations(entry: Entry, best: Entry, seeds: Sequence[int]) -> str:
    """Return the verdict of a paired t test on means over searches, one pair a calibration that both have."""
    ours, theirs = ([float(np.mean(side.by_calibration[seed])) for seed in seeds] for side in (entry, best))
    test = paired(ours, theirs)
    if test.probability is None:
        return "behind" if test.kl > test.other else "equal"
    words = "behind" if test.better is False else NO_DIFFERENCE if test.better is None else "ahead"
    return f"{words} (p = {test.probability:.2g} over {len(seeds)} calibrations)"


def _over_windows(entry: Entry, best: Entry) -> str:
    """Return the verdict of a paired t test over windows of validation text; single searches say nothing of seeds."""
    ours = entry.rows[0]
    theirs = best.rows[0]
    same = ours.get("text") is not None and ours.get("text") == theirs.get("text")
    if not (same and ours.get(BY_WINDOW) and theirs.get(BY_WINDOW)):
        return "behind (too few seeds to tell noise)"
    test = paired(ours[BY_WINDOW], theirs[BY_WINDOW])
    if test.probability is None:
        return "behind (too few seeds to tell noise)"
    words = "behind" if test.better is False else NO_DIFFERENCE
    return f"{words} (p = {test.probability:.2g} over windows, one seed)"


COLUMNS = (
    "budget",
    "sampler",
    "seeds",
    "bits_per_weight",
    "kl",
    "kl_sd",
    "kl_sd_search",
    "kl_sd_calibration",
    "ppl",
    "ppl_sd",
    "tokens",
    "seconds",
    "verdict",
)


def table(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the comparison, columns as ``COLUMNS``: means and standard deviations over seeds."""
    found = entries(rows)
    best: dict[str, Entry] = {}
    for entry in found:
        best.setdefault(entry.budget, entry)
    return [
        [
            entry.budget,
            entry.name,
            len(entry.rows),
            entry.mean("bits_per_weight"),
            entry.mean("kl"),
            entry.sd("kl"),
            entry.noise.search,
            entry.noise.calibration,
            entry.mean("ppl"),
            entry.sd("ppl"),
            entry.mean("tokens"),
            entry.mean("seconds"),
            verdict(entry, best[entry.budget]),
        ]
        for entry in found
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table; with several calibrations, the noise of search and of calibration."""
    found = [dict(zip(COLUMNS, line, strict=True)) for line in table(rows)]
    several = any(line["kl_sd_calibration"] is not None for line in found)
    noise = " search sd | calibration sd |" if several else ""
    lines = [
        f"| budget | sampler | seeds | bits/weight | val KL |{noise} val PPL | tokens | seconds | |",
        "|---" * (9 + 2 * several) + "|",
    ]
    for line in found:
        cells = [line["budget"], line["sampler"], line["seeds"], f"{line['bits_per_weight']:.3f}"]
        cells.append(_spread(line["kl"], line["kl_sd"], 4))
        if several:
            cells += [_sd(line["kl_sd_search"]), _sd(line["kl_sd_calibration"])]
        cells += [_spread(line["ppl"], line["ppl_sd"], 2), f"{line['tokens']:,.0f}", f"{line['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {line['verdict']} |")
    return "\n".join([*lines, "", EXPLAINED, *([EXPLAINED_NOISE] if several else [])])


def _sd(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _spread(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
