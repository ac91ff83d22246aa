"""Scores of every level from a few backward passes: what it changes in a weight, times the loss's gradient there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evosweep.allocators.harm import AUTO_QUANTIZE, AUTO_SCHEME, FISHER
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.evaluate.curvature import by_level
from evosweep.evaluate.passes import BACKWARD, Numbers, layers_with_gradients, orders_of, run_passes
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps


def fisher(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return ½ ΔWᵀ F ΔW of every level of every unit, in nats a token: the KL to second order in the change ΔW.

    F is the Fisher information of the dense model, E[g gᵀ] over text and over labels that the model itself draws, with
    g the gradient of log p; so ΔWᵀ F ΔW = E[(g · ΔW)²], and no matrix is formed. Unlike HAWQ-V2's trace it knows the
    direction of ΔW. Labels of different tokens are independent, so a window's sum of gradients gives an unbiased
    estimate of its sum over tokens; each window is a pass of its own, since a pass gives one sample.

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
    orders = _windows_alone(evaluator, problem, tokens, seed)
    squares = _summed("squared_products", evaluator, problem, orders, progress, steps)
    return _columns(FISHER, problem, 0.5 * squares / (len(orders) * _seq_len(evaluator)))


def auto_quantize(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return Σ (∂loss/∂Y)² ⊙ (ΔY)² of every level of every unit, a token: what NVIDIA ModelOpt's AutoQuantize sums.

    The loss is that of the text's own next tokens, Y a layer's outputs and ΔY what the level changes in them: the
    diagonal of the Fisher information in each output, with the text's labels in place of the model's. A dearer level
    counts as no worse than any cheaper one of its unit, as in ModelOpt (``torch/quantization/algorithms.py``,
    ``AutoQuantizeGradientSearcher``). Differs from ModelOpt in that no level is free of harm unless it changes nothing
    (ModelOpt scores an unquantized layer 0), that fused layers share a level only with ``units.tie=fused``, and that a
    single expert of several has no score.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: As many as scoring every unit once on so many would cost, a backward pass counted as two forward ones,
            a product of a layer's inputs with all that its levels change as one.
        seed: Chooses windows.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
        ModelError: A unit is one expert of several.
    """
    forwards = BACKWARD - 1 + int(problem.sizes.max())  # weights get no gradient; each level is multiplied once
    orders = _windows_alone(evaluator, problem, tokens, seed, forwards=forwards)
    squares = _summed("output_squares", evaluator, problem, orders, progress, steps)
    columns = _columns(AUTO_QUANTIZE, problem, squares / (len(orders) * _seq_len(evaluator)))
    return {name: falling(values) for name, values in columns.items()}


def falling(harms: Mapping[str, float]) -> dict[str, float]:
    """Return the harms of a unit's levels, cheapest first, each at most that of every cheaper level."""
    return dict(zip(harms, np.minimum.accumulate(list(harms.values())).tolist(), strict=True))


def auto_scheme(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return Σ |∂loss/∂Ŵ ⊙ (W − Ŵ)| of every level of every unit, a token: what Intel AutoRound's AutoScheme sums.

    The loss is that of the text's own next tokens, in a model whose layers are all at the level which is scored
    (AutoRound, ``auto_scheme/delta_loss.py``); so every level takes passes of its own, one window each as in AutoRound
    with a batch of one, and each gets its share of the tokens. Differs from AutoRound in that levels are those of the
    store (AutoRound scores a cheaper rounding than it exports), that an embedding and a head are scored like any layer
    (AutoRound chooses an embedding's level apart and keeps a head at 6 bits or more where it can), and that integer
    programming selects, where AutoRound's dynamic programming keeps a bounded number of states.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: As many as scoring every unit once on so many would cost, a backward pass counted as two forward ones.
        seed: Chooses windows.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.

    Raises:
        EvosweepError: A unit is not a layer's weight, or some weights are not on the model's device.
    """
    levels = int(problem.sizes.max())
    orders = _windows_alone(evaluator, problem, tokens, seed, forwards=BACKWARD * levels)
    of_levels = [{**order, "level": level} for level in range(levels) for order in orders]
    sums = _summed("absolute_products", evaluator, problem, of_levels, progress, steps)
    return _columns(AUTO_SCHEME, problem, sums / (len(orders) * _seq_len(evaluator)))


def _seq_len(evaluator: Evaluator) -> int:
    return int(evaluator.splits["search"].windows.shape[1])


def _windows_alone(
    evaluator: Evaluator, problem: Problem, tokens: int, seed: int, *, forwards: int = BACKWARD
) -> list[dict[str, Any]]:
    """Return orders of as many passes as the tokens allow, one at least, each over one window.

    Args:
        evaluator: Has the text.
        problem: Units.
        tokens: For each unit.
        seed: Chooses windows and labels.
        forwards: Forward passes that a window costs as much as.
    """
    count = max(1, len(problem.units) * tokens // (forwards * _seq_len(evaluator)))
    return orders_of(evaluator, windows=count, together=1, seed=seed)


def _summed(
    score: str,
    evaluator: Evaluator,
    problem: Problem,
    orders: Sequence[dict[str, Any]],
    progress: Progress,
    steps: Steps | None,
) -> Numbers:
    """Return a score's sum over passes, shape (layers, longest ladder)."""
    return run_passes(
        evaluator,
        layers_with_gradients(evaluator, problem),
        orders,
        score=score,
        steps=steps or Steps(),
        progress=progress,
        description="gradients times changes",
    )


def _columns(column: str, problem: Problem, numbers: Numbers) -> dict[str, dict[str, float]]:
    """Return a column of every level of every unit.

    Args:
        column: Its name.
        problem: Units.
        numbers: Of their layers in order, shape (layers, longest ladder).
    """
    layers = [layer.name for unit in problem.units for layer in unit.layers]
    return by_level(column, problem, dict(zip(layers, numbers.tolist(), strict=True)))
