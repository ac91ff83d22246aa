"""The curvature of the loss in each layer's weights, which HAWQ-V2's estimate of harm needs."""

import math
from collections.abc import Mapping, Sequence

from evosweep.allocators.harm import HAWQ
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.evaluate.gradient_scores import Changes
from evosweep.evaluate.passes import BACKWARD, layers_with_gradients, orders_of, run_passes
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.slots import Slot

PASSES = 32  # number of backward passes, unless that puts more than TOGETHER tokens into one
TOGETHER = 16384  # most tokens in one backward pass


def hawq_v2(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return ½ · mean Hessian eigenvalue · ‖W − Ŵ‖² of every unit at every level (HAWQ-V2, arXiv 1911.03852, eq. 9).

    The trace is that of the Hessian of KL(dense ‖ compressed) at the dense weights, which is the Fisher information:
    the expected square of the gradient of log p at labels drawn from the dense model itself. Labels of different
    tokens are independent, so one backward pass gives an unbiased estimate for all of its windows; no second
    derivative is needed, where HAWQ-V2 takes Hutchinson's.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: As many as scoring every unit once on so many would cost, a backward pass counted as two forward ones.
        seed: Chooses windows and labels.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
    """
    slots = layers_with_gradients(evaluator, problem)
    seq_len = evaluator.splits["search"].windows.shape[1]
    count = max(1, len(problem.units) * tokens // (BACKWARD * seq_len))
    together = max(1, min(math.ceil(count / PASSES), TOGETHER // seq_len))
    orders = orders_of(evaluator, windows=count, together=together, seed=seed)
    squares = run_passes(
        evaluator,
        slots,
        orders,
        score="squares",
        steps=steps or Steps(),
        progress=progress,
        description="measuring curvature",
    )
    traces = (squares[:, 0] / (count * seq_len)).tolist()  # a token
    return _harms(evaluator, problem, slots, traces)


def _harms(
    evaluator: Evaluator, problem: Problem, slots: Sequence[Slot], traces: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return the harm of every unit's levels; that of tied layers is the sum of theirs.

    Args:
        evaluator: Has the levels.
        problem: Units.
        slots: Of the units' layers, in order.
        traces: Trace of every layer's Hessian, a token.
    """
    changes = Changes(evaluator, slots)
    numbers: dict[str, list[float]] = {}
    for index, (slot, trace) in enumerate(zip(slots, traces, strict=True)):
        half = 0.5 * trace / slot.read().numel()
        numbers[slot.name] = [half * float(change.square().sum()) for change in changes.of(index)]
    return by_level(HAWQ, problem, numbers)


def by_level(column: str, problem: Problem, numbers: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return a column of every level of every unit; that of tied layers is the sum of theirs.

    Args:
        column: Its name, without the level's.
        problem: Units.
        numbers: One a level, by layer.
    """
    return {
        unit.name: {
            f"{column}/{level.name}": sum(float(numbers[layer.name][index]) for layer in unit.layers)
            for index, level in enumerate(unit.levels)
        }
        for unit in problem.units
    }
