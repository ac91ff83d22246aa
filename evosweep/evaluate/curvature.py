"""The curvature of the loss in each layer's weights, which the estimates of harm of HAWQ and HAWQ-V2 need."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from evosweep.allocators.harm import HAWQ, HAWQ_HUTCHINSON, HAWQ_TOP, ORDER
from evosweep.core.events import Progress, Silent
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.gradient_scores import Changes
from evosweep.evaluate.hessian import HESSIAN, LONGEST, Curvature, chunks_of, top_eigenvalue
from evosweep.evaluate.passes import BACKWARD, layers_with_gradients, orders_of, run_passes
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.device import moved
from evosweep.models.slots import Slot

PASSES = 32  # number of backward passes, unless that puts more than TOGETHER tokens into one
TOGETHER = 16384  # most tokens in one backward pass
ITERATIONS = 6  # of the power iteration: the value converges twice as fast as the vector
PRODUCT = 3  # a product with the Hessian costs as much as so many forward passes, from a block on average
INPUT_PASSES = 4  # products with the Hessian in the layers' inputs
LEAST = 32  # tokens of a power iteration, whatever was asked for


def hawq_v2(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return ½ · mean Hessian eigenvalue · ‖W − Ŵ‖² of every unit at every level (HAWQ-V2, arXiv 1911.03852: Ω).

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
    return _harms(HAWQ, evaluator, problem, slots, [trace / _numel(slot) for slot, trace in _pairs(slots, traces)])


def hawq_v2_hutchinson(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return what ``hawq_v2`` does, the trace by Hutchinson's estimate: the mean of vᵀ H v over vectors v of signs.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: As many as scoring every unit once on so many would cost, a product with the Hessian counted as nine
            forward passes, of each chunk of layers from its first block on.
        seed: Chooses windows and signs.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
    """
    slots = layers_with_gradients(evaluator, problem)
    length = min(evaluator.splits["search"].windows.shape[1], LONGEST)
    forwards = HESSIAN * (len(chunks_of(slots)) + 1) / 2
    count = max(1, int(len(problem.units) * tokens / (forwards * length)))
    sums = run_passes(
        evaluator,
        slots,
        orders_of(evaluator, windows=count, together=1, seed=seed),
        score="hutchinson",
        steps=steps or Steps(),
        progress=progress,
        description="measuring traces",
    )
    traces = (sums[:, 0] / (count * length)).clip(min=0.0).tolist()
    means = [trace / _numel(slot) for slot, trace in _pairs(slots, traces)]
    harms = _harms(HAWQ_HUTCHINSON, evaluator, problem, slots, means)
    if evaluator.inputs is not None:
        _add_inputs(harms, evaluator, problem, slots, seed)
    return harms


def _add_inputs(
    harms: dict[str, dict[str, float]], evaluator: Evaluator, problem: Problem, slots: Sequence[Slot], seed: int
) -> None:
    """Add ½ · mean trace of the Hessian in a layer's inputs · ‖Q(x) − x‖² to every level, where inputs are rounded.

    All levels of a unit have the same inputs, so this changes no allocation, only what one is expected to cost.

    Args:
        harms: Changed in place.
        evaluator: Rounds inputs.
        problem: Units.
        slots: Of the units' layers, in order.
        seed: Chooses windows and signs.
    """
    orders = orders_of(evaluator, windows=INPUT_PASSES, together=1, seed=seed)
    length = min(evaluator.splits["search"].windows.shape[1], LONGEST)
    found = run_passes(
        evaluator,
        slots,
        orders,
        score="input_hutchinson",
        steps=Steps(),
        progress=Silent(),
        description="measuring traces of inputs",
    )
    traces = (found[:, 0] / INPUT_PASSES).clip(min=0.0)
    changes = found[:, 1] / (INPUT_PASSES * length)
    by_layer = {slot.name: 0.5 * float(one) for slot, one in _pairs(slots, (traces * changes).tolist())}
    for unit in problem.units:
        own = sum(by_layer[layer.name] for layer in unit.layers)
        for level in unit.level_names:
            harms[unit.name][f"{HAWQ_HUTCHINSON}/{level}"] += own


def hawq_tokens(problem: Problem, tokens: int) -> int:
    """Return the tokens that ``hawq`` is counted as: ``tokens`` a unit, or what it takes at least.

    Args:
        problem: Units.
        tokens: For each unit.
    """
    return len(problem.units) * max(tokens, ITERATIONS * PRODUCT * LEAST)


def hawq(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return ½ · top Hessian eigenvalue · ‖W − Ŵ‖² of every unit at every level (HAWQ, arXiv 1905.03696: Ω).

    The Hessian is that of the KL in one layer's weight; its top eigenvalue is found by power iteration on the first
    tokens of some windows. The layers of a block share one graph.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: As many as scoring every unit once on so many would cost, a product with the Hessian counted as three
            forward passes: six, of half of the blocks on average.
        seed: Chooses windows and first vectors.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
    """
    slots = layers_with_gradients(evaluator, problem)
    windows = evaluator.splits["search"].windows
    asked = max(LEAST, tokens // (ITERATIONS * PRODUCT))
    length = min(asked, LONGEST, windows.shape[1])
    chosen = generator(seed, "curvature").integers(len(windows), size=max(1, asked // length))
    ids = moved(windows[chosen, :length], evaluator.anatomy.device)
    group_of = {index: tuple(group) for group in chunks_of(slots, most=1) for index in group}
    graphs: dict[tuple[int, ...], Curvature] = {}  # of the last block alone

    def of(index: int) -> float:
        group = group_of[index]
        if group not in graphs:
            graphs.clear()
            graphs[group] = Curvature(evaluator.anatomy, [slots[member] for member in group], ids)
        first = int(generator(seed, "eigenvector", slots[index].name).integers(2**31))
        return top_eigenvalue(graphs[group], group.index(index), iterations=ITERATIONS, seed=first)

    order = sorted(group_of, key=lambda index: (group_of[index], index))
    found = (steps or Steps()).run(order, of, progress=progress, description="top eigenvalues")
    values = np.zeros(len(slots))
    values[order] = np.concatenate(found) / ids.numel()
    return _harms(HAWQ_TOP, evaluator, problem, slots, values.tolist())


def _numel(slot: Slot) -> int:
    rows, columns = slot.shape
    return rows * columns


def _pairs(slots: Sequence[Slot], numbers: Sequence[float]) -> list[tuple[Slot, float]]:
    return list(zip(slots, numbers, strict=True))


def _harms(
    column: str, evaluator: Evaluator, problem: Problem, slots: Sequence[Slot], curvatures: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return the harm of every unit's levels, and the unit's curvature a weight, by which HAWQ orders units.

    Args:
        column: Its name, without the level's.
        evaluator: Has the levels.
        problem: Units.
        slots: Of the units' layers, in order.
        curvatures: Of every layer, a token; harm is half of it x ‖W − Ŵ‖².
    """
    changes = Changes(evaluator, slots)
    numbers: dict[str, list[float]] = {}
    for index, (slot, curvature) in enumerate(_pairs(slots, curvatures)):
        numbers[slot.name] = [0.5 * curvature * float(change.square().sum()) for change in changes.of(index)]
    harms = by_level(column, problem, numbers)
    own = {slot.name: curvature for slot, curvature in _pairs(slots, curvatures)}
    for unit in problem.units:
        a_weight = [own[layer.name] / (layer.numel if column == HAWQ_TOP else 1) for layer in unit.layers]
        mean = float(np.average(a_weight, weights=[layer.numel for layer in unit.layers]))
        harms[unit.name][f"{column}{ORDER}"] = mean
    return harms


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
