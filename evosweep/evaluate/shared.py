"""Divides the scoring of a population among processes: token windows are dealt out, and losses come back in order.

Every process has the same model, levels and text, and computes the losses of whole windows; what is left when the
windows do not divide evenly is divided by candidates. Losses are put together by window and candidate before anything
is averaged, so a mean does not depend on how many processes there are.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evosweep import parallel
from evosweep.core.errors import EvosweepError
from evosweep.fitness.base import Fitness

Genomes = npt.NDArray[np.int64]
Losses = dict[str, npt.NDArray[np.float32]]
LOSSES = "losses"  # names of orders
TUNED = "tuned"


def shares(candidates: int, windows: int, processes: int) -> list[list[tuple[slice, slice]]]:
    """Return the (candidates, windows) that every process scores, as few slices as possible.

    Args:
        candidates: How many there are.
        windows: How many token windows each of them is scored on.
        processes: How many share the work.
    """
    even = windows // processes
    dealt = []
    for process in range(processes):
        parts = [(slice(0, candidates), slice(process * even, (process + 1) * even))] if even else []
        if windows % processes and process < candidates:
            parts.append((slice(process, candidates, processes), slice(even * processes, windows)))
        dealt.append(parts)
    return dealt


@dataclass(frozen=True)
class Wanted:
    """What is computed of genomes: arguments of ``Evaluator.token_losses``."""

    split: str
    windows: Sequence[int]
    fitness: Sequence[Fitness]
    length: int | None = None


@dataclass
class Sharing:
    """The losses of a population, computed by all processes; made in the leader.

    Attributes:
        evaluator: Computes this process's share.
        sent: Tuned parameters that the other processes have.
    """

    evaluator: Any
    sent: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def losses(self, genomes: Genomes | None, wanted: Wanted) -> Losses:
        """Return the loss of each genome on each token, as ``Evaluator.token_losses`` does."""
        if self.evaluator.tuned_values is not self.sent:
            parallel.ask(TUNED, tensors={k: v.detach().cpu() for k, v in self.evaluator.tuned_values.items()})
            self.sent = self.evaluator.tuned_values
        facts = {
            "split": wanted.split,
            "windows": [int(window) for window in wanted.windows],
            "fitness": [one.name for one in wanted.fitness],
            "length": wanted.length,
            "exact": self.evaluator.inputs is None,
        }
        tensors = {} if genomes is None else {"genomes": torch.from_numpy(np.ascontiguousarray(genomes))}
        candidates = 1 if genomes is None else len(genomes)
        dealt = shares(candidates, len(wanted.windows), parallel.count())
        with parallel.asked(LOSSES, facts, tensors) as answers:
            own = _computed(self.evaluator, genomes, dealt[0], wanted)
        found = [own, *({k: v.numpy() for k, v in tensors.items()} for _, tensors in answers)]
        return _assembled(found, dealt, (candidates, len(wanted.windows)), wanted.fitness)


def answer_losses(
    evaluator: Any, known: Mapping[str, Fitness], facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> parallel.Message:
    """Return this process's share of the losses that the leader asks for.

    Args:
        evaluator: Of this process.
        known: Every fitness by its name.
        facts: Of the order.
        tensors: Of the order.

    Raises:
        EvosweepError: An unknown fitness, or what ``Evaluator.token_losses`` raises.
    """
    unknown = [name for name in facts["fitness"] if name not in known]
    if unknown:
        raise EvosweepError(f"there is no fitness {unknown[0]!r} here")
    genomes = tensors["genomes"].numpy() if "genomes" in tensors else None
    candidates = 1 if genomes is None else len(genomes)
    parts = shares(candidates, len(facts["windows"]), parallel.count())[parallel.rank()]
    wanted = Wanted(facts["split"], facts["windows"], [known[name] for name in facts["fitness"]], facts["length"])
    with evaluator.exact_inputs() if facts["exact"] else nullcontext():
        found = _computed(evaluator, genomes, parts, wanted)
    return {}, {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def _computed(evaluator: Any, genomes: Genomes | None, parts: Sequence[tuple[slice, slice]], wanted: Wanted) -> Losses:
    """Return the losses of one process's parts, by the part's number and the fitness's name.

    Args:
        evaluator: Computes them.
        genomes: All candidates; None is the dense model.
        parts: Candidates and windows.
        wanted: All windows, and what to compute.
    """
    found = {}
    for number, (rows, span) in enumerate(parts):
        some = replace(wanted, windows=wanted.windows[span])
        losses = evaluator.own_losses(None if genomes is None else genomes[rows], some)
        found.update({f"{number}/{name}": values for name, values in losses.items()})
    return found


def _assembled(
    found: Sequence[Mapping[str, npt.NDArray[np.float32]]],
    dealt: Sequence[Sequence[tuple[slice, slice]]],
    shape: tuple[int, int],
    fitness: Sequence[Fitness],
) -> Losses:
    """Return the losses of all processes, each where one process alone would have put it."""
    losses: Losses = {}
    for values, parts in zip(found, dealt, strict=True):
        for number, (rows, span) in enumerate(parts):
            for one in fitness:
                part = values[f"{number}/{one.name}"]
                whole = losses.setdefault(one.name, np.empty((*shape, part.shape[2]), dtype=np.float32))
                whole[rows, span] = part
    return losses
