"""Backward passes over windows of text: chosen, shared among processes, kept, and their scores summed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evosweep import parallel
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.gradient_scores import SCORES
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.device import moved
from evosweep.models.slots import Slot

BACKWARD = 3  # a forward and a backward pass cost as much as so many forward passes
PASSES = "gradients"  # name of an order
Numbers = npt.NDArray[np.float64]


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
    """Return the scores that this process's backward pass gave, as the answer to another process's question.

    The message has ``numbers``, a flat list, layer after layer: empty where there are fewer passes than processes.

    Args:
        evaluator: Has the dense model and the search text.
        facts: The question: ``layers`` (names), ``passes`` (windows and seed of each) and ``score``, a key of SCORES.
    """
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
