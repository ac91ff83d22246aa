"""The spectra of the dense weights, which AlphaPruning reads."""

import numpy as np

from evosweep.allocators.alpha_pruning import HILL
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.spectrum import hill_exponent


def hill_exponents(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return the Hill exponent of the dense weight of every unit that has a weight (drop units have none).

    Of a tied unit it is the mean over its layers, by weights, as over the layers of a block.

    Args:
        evaluator: Has the model.
        problem: Units.
        tokens: Not used: weights alone are measured.
        seed: Not used.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.
    """
    del tokens, seed
    slots = {slot.name: slot for slot in evaluator.anatomy.all_slots}
    units = {unit.name: unit for unit in problem.units if unit.layers[0].name in slots}

    def exponent(name: str) -> float:
        layers = units[name].layers
        exponents = [hill_exponent(slots[layer.name].read()) for layer in layers]
        return float(np.average(exponents, weights=[layer.numel for layer in layers]))

    found = (steps or Steps()).run(list(units), exponent, progress=progress, description="spectra of the weights")
    return {name: {HILL: float(value[0])} for name, value in zip(units, found, strict=True)}
