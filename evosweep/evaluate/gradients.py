"""Scores of every level from a few backward passes: what it changes in a weight, times the loss's gradient there."""

from evosweep.allocators.harm import FISHER
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.evaluate.curvature import by_level
from evosweep.evaluate.passes import BACKWARD, layers_with_gradients, orders_of, run_passes
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
    slots = layers_with_gradients(evaluator, problem)
    seq_len = evaluator.splits["search"].windows.shape[1]
    count = max(1, len(problem.units) * tokens // (BACKWARD * seq_len))
    squares = run_passes(
        evaluator,
        slots,
        orders_of(evaluator, windows=count, together=1, seed=seed),
        score="squared_products",
        steps=steps or Steps(),
        progress=progress,
        description="gradients times changes",
    )
    harms = 0.5 * squares / (count * seq_len)
    return by_level(FISHER, problem, {slot.name: row for slot, row in zip(slots, harms.tolist(), strict=True)})
