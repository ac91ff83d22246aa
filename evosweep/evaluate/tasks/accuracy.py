"""Turns likelihoods of choices into accuracies with standard errors, and compares two models question by question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from evosweep.evaluate.tasks.log_likelihood import Likelihoods
from evosweep.evaluate.tasks.questions import Question

PER_CHARACTER = "per_character"
SUM = "sum"
GREEDY = "greedy"
SCORES = (SUM, PER_CHARACTER, GREEDY)


@dataclass(frozen=True)
class Accuracy:
    """How many questions of a task a model answers right.

    Attributes:
        correct: Of every question, whether it was.
    """

    correct: tuple[bool, ...]

    @property
    def mean(self) -> float:
        """Share of questions answered right."""
        return sum(self.correct) / len(self.correct)

    @property
    def error(self) -> float:
        """Standard error of the mean over questions."""
        return math.sqrt(self.mean * (1 - self.mean) / max(len(self.correct) - 1, 1))

    def row(self) -> dict[str, object]:
        """Return what ``result.json`` says of it."""
        return {
            "accuracy": self.mean,
            "stderr": self.error,
            "questions": len(self.correct),
            "correct": "".join("01"[right] for right in self.correct),
        }


def is_right(question: Sequence[Question], found: Sequence[Likelihoods], score: str) -> bool:
    """Return whether a model answers a question right: the choice with the best score is the right one.

    Args:
        question: Its parts.
        found: What the model says of each part's choices.
        score: ``sum``: the log-likelihood; ``per_character``: divided by the choice's characters, the space it begins
            with not counted, as in lm-evaluation-harness, lighteval (``nospace``) and OLMo's evaluation from version
            2; ``greedy``: the right choice is what greedy decoding writes.
    """
    choices = [choice for part in question for choice in part.choices]
    sums = [value for part in found for value in part.sums]
    right = question[0].right
    if score == GREEDY:
        return [value for part in found for value in part.greedy][right]
    if score == PER_CHARACTER:
        sums = [value / max(len(choice.removeprefix(" ")), 1) for value, choice in zip(sums, choices, strict=True)]
    return max(range(len(sums)), key=sums.__getitem__) == right


def judged(questions: Sequence[Sequence[Question]], found: Mapping[int, Sequence[Likelihoods]], score: str) -> Accuracy:
    """Return the accuracy of a model on questions.

    Args:
        questions: Each a list of its parts.
        found: Index of a question -> what the model says of each part's choices.
        score: As for ``is_right``.
    """
    return Accuracy(tuple(is_right(parts, found[index], score) for index, parts in enumerate(questions)))


def compared(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """Return the difference of two accuracies on the same questions, and its p-value.

    McNemar's exact test: of the questions that only one of both answers right, each should have half.
    """
    gained = sum(one and not other for one, other in zip(first, second, strict=True))
    lost = sum(other and not one for one, other in zip(first, second, strict=True))
    p_value = 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)
    return (gained - lost) / len(first), p_value
