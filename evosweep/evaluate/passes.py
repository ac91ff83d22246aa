"""The scores that are read from backward passes, and the passes themselves, of which each process makes some."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evosweep import parallel
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.backward import sampled_labels, visit_gradients
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.device import moved
from evosweep.models.slots import Slot

BACKWARD = 3  # a forward and a backward pass cost as much as so many forward passes
PASSES = "gradients"  # name of an order
Numbers = npt.NDArray[np.float64]
Score = Callable[[Evaluator, Sequence[Slot], torch.Tensor, Mapping[str, Any]], torch.Tensor]
"""From the evaluator, slots, token ids (rows, seq_len) and the pass's order to numbers, a row a slot."""


def squares(evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]) -> torch.Tensor:
    """Return the squared norm of the gradient of log p(y) by slot, shape (slots,), at labels y drawn from the model.

    Args:
        evaluator: Has the dense model.
        slots: Whose weights the gradient is taken of.
        ids: Token ids (rows, seq_len).
        order: Its ``seed`` chooses the labels.
    """
    anatomy = evaluator.anatomy
    found = torch.zeros(len(slots), dtype=torch.float64, device=anatomy.device)

    def add(index: int, gradient: torch.Tensor) -> None:
        found[index] = gradient.float().square().sum()

    visit_gradients(anatomy, slots, ids, loss=sampled_labels(order["seed"]), visit=add)
    return found


def squared_products(
    evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]
) -> torch.Tensor:
    """Return (g · ΔW)² for every level of every slot, shape (slots, longest ladder), with g the gradient of log p(y).

    At labels y drawn from the dense model; ΔW is what the level changes in the weight.

    Args:
        evaluator: Has the dense model and the levels.
        slots: Whose weights the gradient is taken of.
        ids: Token ids (rows, seq_len).
        order: Its ``seed`` chooses the labels.
    """
    changes = Changes(evaluator, slots)
    found = changes.zeros()

    def add(index: int, gradient: torch.Tensor) -> None:
        for level, change in enumerate(changes.of(index)):
            found[index, level] = (gradient.float() * change).sum(dtype=torch.float64).square()

    visit_gradients(evaluator.anatomy, slots, ids, loss=sampled_labels(order["seed"]), visit=add)
    return found


class Changes:
    """What each level changes in the weights of some slots.

    Args:
        evaluator: Has the dense model and the levels.
        slots: Layers of the store.
    """

    def __init__(self, evaluator: Evaluator, slots: Sequence[Slot]) -> None:
        stored = {unit.name: (index, len(unit.levels)) for index, unit in enumerate(evaluator.store.units)}
        self.evaluator = evaluator
        self.slots = slots
        self.ladders = [stored[slot.name] for slot in slots]

    def zeros(self) -> torch.Tensor:
        """Return zeros for every level of every slot, shape (slots, longest ladder)."""
        longest = max(size for _, size in self.ladders)
        return torch.zeros(len(self.slots), longest, dtype=torch.float64, device=self.evaluator.anatomy.device)

    def of(self, index: int) -> Iterator[torch.Tensor]:
        """Yield what each level of a slot changes in its dense weight, shape (out, in), fp32, lowest level first."""
        unit, size = self.ladders[index]
        dense = self.slots[index].read().detach().float()
        for level in range(size):
            yield self.evaluator.weight(unit, level).float() - dense


SCORES: Mapping[str, Score] = {"squares": squares, "squared_products": squared_products}


def layers_with_gradients(evaluator: Evaluator, problem: Problem) -> list[Slot]:
    """Return the slots of the layers of all units, in order.

    Args:
        evaluator: Has the dense model.
        problem: Units.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
    """
    slots = {slot.name: slot for slot in evaluator.anatomy.all_slots}
    layers = [layer for unit in problem.units for layer in unit.layers]
    others = [layer.name for layer in layers if layer.name not in slots]
    if others:
        raise EvosweepError(f"curvature is defined for a layer's weight; {others[0]} is not one")
    mine = [slots[layer.name] for layer in layers]
    if any(slot.parameter.device != evaluator.anatomy.device for slot in mine):
        raise EvosweepError("curvature needs all weights on the model's device: model.offload=false")
    return mine


def orders_of(evaluator: Evaluator, *, windows: int, together: int, seed: int) -> list[dict[str, Any]]:
    """Return the orders of backward passes: their windows of the search split, and the seed of their labels.

    Args:
        evaluator: Has the split.
        windows: Number of windows in all.
        together: Windows in one pass.
        seed: Chooses windows and labels.
    """
    chosen = generator(seed, "curvature").integers(len(evaluator.splits["search"].windows), size=windows)
    return [
        {
            "windows": chosen[start : start + together].tolist(),
            "seed": int(generator(seed, "labels", draw).integers(2**31)),
        }
        for draw, start in enumerate(range(0, windows, together))
    ]


def run_passes(
    evaluator: Evaluator,
    slots: Sequence[Slot],
    orders: Sequence[Mapping[str, Any]],
    *,
    score: str,
    steps: Steps,
    progress: Progress,
    description: str,
) -> Numbers:
    """Return the sum over passes of a score, shape as the score's.

    Args:
        evaluator: Has the dense model and the levels.
        slots: Whose gradients are read.
        orders: One for each pass.
        score: A key of ``SCORES``.
        steps: Keeps what is done.
        progress: Shows how far it is.
        description: What it shows.
    """
    names = [slot.name for slot in slots]
    ahead: dict[int, list[float]] = {}  # passes that other processes have made

    def of(draw: int) -> list[float]:
        if draw not in ahead:
            together = orders[draw : draw + (1 if evaluator.sharing is None else parallel.count())]
            ahead.update(enumerate(_shared(evaluator, names, together, score), start=draw))
        return ahead.pop(draw)

    found = steps.run(range(len(orders)), of, progress=progress, description=description)
    total = np.zeros(len(found[0]))
    for of_pass in found:  # in their order: the sum is rounded as it always is
        total += of_pass
    return total.reshape(len(slots), -1)


def _shared(
    evaluator: Evaluator, layers: Sequence[str], orders: Sequence[Mapping[str, Any]], score: str
) -> list[list[float]]:
    """Return the numbers of some backward passes, of which every process makes one.

    Args:
        evaluator: Has the dense model.
        layers: Names of the layers.
        orders: One for each pass.
        score: A key of ``SCORES``.
    """
    facts = {"layers": list(layers), "passes": list(orders), "score": score}
    if len(orders) == 1:
        return [_one(evaluator, facts, 0)]
    with parallel.asked(PASSES, facts) as answers:
        own = _one(evaluator, facts, 0)
    return [own, *(answer["numbers"] for answer, _ in answers[: len(orders) - 1])]


def answer_pass(evaluator: Evaluator, facts: Mapping[str, Any]) -> parallel.Message:
    """Return the numbers of this process's backward pass, if there is one for it."""
    mine = parallel.rank() < len(facts["passes"])
    return {"numbers": _one(evaluator, facts, parallel.rank()) if mine else []}, {}


def _one(evaluator: Evaluator, facts: Mapping[str, Any], number: int) -> list[float]:
    """Return the numbers of one pass, a slot's together."""
    slots = {slot.name: slot for slot in evaluator.anatomy.all_slots}
    order = facts["passes"][number]
    ids = moved(evaluator.splits["search"].windows[order["windows"]], evaluator.anatomy.device)
    found = SCORES[facts["score"]](evaluator, [slots[name] for name in facts["layers"]], ids, order)
    numbers: list[float] = found.flatten().tolist()
    return numbers
