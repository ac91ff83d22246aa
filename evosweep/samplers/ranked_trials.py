"""The best trials of a study, kept up to date without looking at old trials again."""

from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState


class RankedTrials:
    """Complete trials within the budget, best first.

    ``update`` reads only the trials that have finished since the last call, whichever worker ran them and however late
    they finished, so that a study of thousands of trials takes no longer a trial than a short one.

    Args:
        names: Parameters that make up an allocation; trials without one of them are ignored.
        maximize: Whether higher values are better.
    """

    def __init__(self, names: Iterable[str], *, maximize: bool) -> None:
        self._names = tuple(names)
        self._sign = -1.0 if maximize else 1.0
        self._ranked: list[tuple[float, int, FrozenTrial]] = []
        self._known: dict[tuple[Any, ...], list[tuple[float, int]]] = {}  # by allocation
        self._settled = 0  # all trials up to this index have finished and were read
        self._read: set[int] = set()  # numbers of those read beyond it

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Add the trials that have finished since the last call.

        Args:
            trials: All trials of the study, by number.
        """
        for trial in trials[self._settled :]:
            if trial.number not in self._read and trial.state.is_finished():
                self._read.add(trial.number)
                self._add(trial)
        while self._settled < len(trials) and trials[self._settled].number in self._read:
            self._read.remove(trials[self._settled].number)
            self._settled += 1

    def best(self, count: int, *, before: int) -> list[FrozenTrial]:
        """Return the best trials numbered below ``before``, at most ``count``, no allocation twice.

        At equal value, the lower number is the better one.
        """
        best: dict[tuple[Any, ...], FrozenTrial] = {}
        for _, number, trial in self._ranked:
            if number < before:
                best.setdefault(self._allocation(trial), trial)
            if len(best) == count:
                break
        return list(best.values())

    def _add(self, trial: FrozenTrial) -> None:
        if trial.state != TrialState.COMPLETE or trial.value is None or not set(self._names) <= trial.params.keys():
            return
        if any(excess > 0 for excess in trial.constraints.values()):
            return
        value = self._sign * float(trial.value)
        same = self._known.setdefault(self._allocation(trial), [])
        if any(other <= value and number < trial.number for other, number in same):
            return  # an earlier trial of the same allocation is at least as good, so that this one is never chosen
        same.append((value, trial.number))
        insort(self._ranked, (value, trial.number, trial))

    def _allocation(self, trial: FrozenTrial) -> tuple[Any, ...]:
        return tuple(trial.params[name] for name in self._names)
