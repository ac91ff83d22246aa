"""Scores allocations on every text that results are reported on."""

from typing import Any

import numpy as np

from evosweep.core.problem import Genome
from evosweep.data.domains import domain_of
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity


def domain_figures(evaluator: Evaluator, genome: Genome | None) -> dict[str, dict[str, Any]]:
    """Return the figures of an allocation on every domain: ``kl``, ``ppl`` and ``kl_by_window``.

    Args:
        evaluator: The model, its levels and the texts.
        genome: Level of every unit, shape (units,); None is the dense model.
    """
    found = {}
    measures: list[Fitness] = [KL(), Perplexity()]
    for split, tokens in evaluator.splits.items():
        domain = domain_of(split)
        if domain is None:
            continue
        losses = evaluator.token_losses(
            None if genome is None else genome[None],
            split=split,
            windows=range(len(tokens.windows)),
            fitness=measures,
        )
        found[domain] = {
            **{one.name: one.reduce(float(losses[one.name].mean(dtype=np.float64))) for one in measures},
            "kl_by_window": losses["kl"][0].mean(axis=1, dtype=np.float64).tolist(),
        }
    return found
