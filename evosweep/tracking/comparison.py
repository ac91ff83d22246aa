"""Comparison of searches: means over seeds, and whether a lead exceeds the noise between seeds."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

Row = Mapping[str, Any]
EXPLAINED = (
    "One line a sampler and budget, sorted by mean validation KL (nats per token) within a budget; ± is the standard "
    "deviation over seeds. p: Welch's t-test of the KLs against the best line. Validation never selects: every winner "
    "was chosen by its score on search tokens."
)
DIGEST = 6  # characters of an identity that a name shows
NOISE = 0.05  # level of Welch's test; what is above it may be the seeds


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
    if len(entry.rows) < 2 or len(best.rows) < 2:
        return "behind (too few seeds to tell noise)"
    ours, theirs = ([row["kl"] for row in side.rows] for side in (entry, best))
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return "behind" if ours[0] > theirs[0] else "equal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them may not vary at all, and the test says so
        chance = float(ttest_ind(ours, theirs, equal_var=False).pvalue)
    return f"behind (p = {chance:.2g})" if chance < NOISE else f"within seed noise (p = {chance:.2g})"


COLUMNS = (
    "budget",
    "sampler",
    "seeds",
    "bits_per_weight",
    "kl",
    "kl_sd",
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
            entry.mean("ppl"),
            entry.sd("ppl"),
            entry.mean("tokens"),
            entry.mean("seconds"),
            verdict(entry, best[entry.budget]),
        ]
        for entry in found
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| budget | sampler | seeds | bits/weight | val KL | val PPL | tokens | seconds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget, name, seeds, bits, kl, kl_sd, ppl, ppl_sd, tokens, seconds, word in table(rows):
        lines.append(
            f"| {budget} | {name} | {seeds} | {bits:.3f} | {_spread(kl, kl_sd, 4)} | {_spread(ppl, ppl_sd, 2)} "
            f"| {tokens:,.0f} | {seconds:.0f} | {word} |"
        )
    return "\n".join([*lines, "", EXPLAINED])


def _spread(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
