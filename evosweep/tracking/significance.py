"""Whether one allocation is better than another on held-out text: a paired test over windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

LEVEL = 0.05  # above it, "no difference found"
SAME_SIZE = 0.01  # share by which sizes may differ and still be called the same
NO_DIFFERENCE = "no difference found"
BY_WINDOW = "kl_by_window"  # entry of a result: mean KL of every validation window, in order
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """Two results on the same windows of held-out text.

    Attributes:
        kl: Mean KL of the first, in nats per token.
        other: Mean KL of the second.
        windows: Number of windows.
        probability: Two-sided p-value of the paired t test; None where it cannot be made (one window, or two
            results that are the same).
    """

    kl: float
    other: float
    windows: int
    probability: float | None

    @property
    def better(self) -> bool | None:
        """True where the first is better, False where it is worse, None where no difference was found."""
        if self.probability is None or self.probability >= LEVEL:
            return None
        return self.kl < self.other

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``no difference found``."""
        return {True: "better", False: "worse", None: NO_DIFFERENCE}[self.better]

    def row(self) -> dict[str, Any]:
        """Return what ``result.json`` says of it."""
        return {
            "kl": self.kl,
            "other": self.other,
            "windows": self.windows,
            "p": self.probability,
            "verdict": self.verdict,
        }

    def sentence(self, *, name: str, than: str) -> str:
        """Return in one sentence what the test found.

        Args:
            name: Of the first result.
            than: Of the second.
        """
        figures = f"KL {self.kl:.3g} against {self.other:.3g} on {self.windows} windows of held-out text"
        if self.probability is None:
            return f"{name} and {than} cannot be told apart: {figures}."
        word = {True: "is better than", False: "is worse than", None: "no difference found to"}[self.better]
        verdict = f"{name} {word} {than}" if self.better is not None else f"{name}: {word} {than}"
        return f"{verdict}: {figures} (paired t test, p = {self.probability:.1g})."


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Return the comparison of two results' losses on the same windows.

    Args:
        first: Mean KL of every window.
        second: The same of the other result, windows in the same order.

    Raises:
        ValueError: They have different numbers of windows.
    """
    ours = np.asarray(first, dtype=np.float64)
    theirs = np.asarray(second, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} windows cannot be compared in pairs")
    testable = len(ours) > 1 and bool(np.ptp(ours - theirs) > 0)
    probability = float(ttest_rel(ours, theirs).pvalue) if testable else None
    return Paired(float(ours.mean()), float(theirs.mean()), len(ours), probability)


def in_words(row: Row) -> str:
    """Return the row of a paired comparison in a few words: ``better, p = 0.003``."""
    p = row["p"]
    return str(row["verdict"]) + ("" if p is None else f", p = {p:.1g}")


def found_sentences(sampler: str, against: Mapping[str, Row]) -> list[str]:
    """Return in a sentence each whether a winner is better than the uniform allocation and than its own start.

    Args:
        sampler: That found it; the uniform one has no sentence.
        against: ``against`` of its result.
    """
    names = {"uniform": "uniform", "start": "its own start"}
    sentences = []
    for name, row in against.items():
        than = f"{names[name]} ({row['bits_per_weight']:.3f} bits)"
        test = Paired(row["kl"], row["other"], row["windows"], row["p"])
        if sampler == "uniform":
            continue
        if name == "start" and row["p"] is None and row["kl"] == row["other"]:
            sentences.append(f"{sampler} ended where it started.")
        else:
            sentences.append(test.sentence(name=sampler, than=than))
    return sentences


def against_uniform(rows: Sequence[Row], best: Row) -> str | None:
    """Return the sentence that compares a result with the uniform one at the same budget; None if there is none.

    Args:
        rows: Results of a multirun.
        best: One of them.
    """
    for row in rows:
        comparable = row["budget"] == best["budget"] and row.get("text") == best.get("text")
        if row["sampler"] == "uniform" and row is not best and comparable and best.get(BY_WINDOW):
            size = f"uniform ({row['size_mb']:.1f} MB, {row['bits_per_weight']:.3f} bits)"
            name = f"{best['sampler']} ({best['size_mb']:.1f} MB, {best['bits_per_weight']:.3f} bits)"
            sentence = paired(best[BY_WINDOW], row[BY_WINDOW]).sentence(name=name, than=size)
            smaller = best["size_mb"] - row["size_mb"]
            if smaller < SAME_SIZE * best["size_mb"]:
                return sentence
            return f"{sentence} Uniform is {smaller:.1f} MB smaller, so part of the difference is size."
    return None
