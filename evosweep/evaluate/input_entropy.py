"""The entropy of each unit's inputs, which decides what blocks are searched together (Q-VLM)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.proxies import activation_numbers
from evosweep.evaluate.steps import Steps
from evosweep.models.device import moved
from evosweep.search.block_groups import ENTROPY


def activation_entropy(
    evaluator: Evaluator,
    problem: Problem,
    *,
    tokens: int,
    seed: int,
    progress: Progress,
    steps: Steps | None = None,
) -> dict[str, dict[str, float]]:
    """Return the entropy of the inputs of every unit that has a layer in a block, in nats, a mean over windows.

    It is that of a histogram of 256 bins between the least and the largest input; of tied layers, their mean.

    Args:
        evaluator: Has the dense model and the text.
        problem: Units.
        tokens: Tokens of the search split.
        seed: Chooses them.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.
    """
    anatomy = evaluator.anatomy
    slots = {slot.name: slot for slot in anatomy.slots}
    layers = [layer.name for unit in problem.units for layer in unit.layers if layer.name in slots]
    split = evaluator.splits["search"]
    count = min(len(split.windows), max(1, tokens // split.seq_len))
    windows = generator(seed, "sensitivity").choice(len(split.windows), count, replace=False).tolist()

    def of(window: int) -> Any:
        ids: torch.Tensor = moved(split.windows[[window]], anatomy.device)
        return activation_numbers(anatomy, [slots[name] for name in layers], ids)[:, 0].tolist()

    found = (steps or Steps()).run(windows, of, progress=progress, description="measuring entropies of activations")
    entropies = dict(zip(layers, np.mean(found, axis=0).tolist(), strict=True))
    return {unit.name: _mean(entropies, [layer.name for layer in unit.layers]) for unit in problem.units}


def _mean(entropies: dict[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Return the column of one unit; empty for a unit without a layer in a block."""
    mine = [entropies[name] for name in layers if name in entropies]
    return {ENTROPY: float(np.mean(mine))} if mine else {}
