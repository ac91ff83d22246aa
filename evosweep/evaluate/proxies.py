"""The table of training-free proxies that EMQ's formulas are made of: statistics of weights, gradients, activations.

Error norms are the store's; SNIP (arXiv 1810.02340), Synflow (arXiv 2006.05467), the Fisher information and its trace
are read from backward passes; the entropy of a layer's inputs is Q-VLM's (arXiv 2410.08119), the outlier ratio OWL's.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from evosweep.allocators.formulas import Table
from evosweep.core.problem import Problem
from evosweep.evaluate.backward import next_tokens, visit_gradients
from evosweep.evaluate.gradient_scores import Changes
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import Slot

BINS = 256  # of the histogram whose entropy is taken
OUTLIERS = "outlier_ratio_m5"  # OWL's default
OF_PASS = 2  # numbers of a slot in a pass before those of its levels: SNIP, squared gradient
Numbers = npt.NDArray[np.float64]


def gradient_numbers(evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor) -> torch.Tensor:
    """Return numbers of each slot's gradient g of the text's loss, shape (slots, 2 + 2 · longest ladder).

    Σ |g ⊙ W| (SNIP) and Σ g²; then for every level Σ |g ⊙ ΔW|; then for every level (g · ΔW)².

    Args:
        evaluator: Has the dense model and the levels.
        slots: The layers.
        ids: Token ids (rows, seq_len).
    """
    changes = Changes(evaluator, slots)
    longest = max(size for _, size in changes.ladders)
    width = OF_PASS + 2 * longest
    found = torch.zeros(len(slots), width, dtype=torch.float64, device=evaluator.anatomy.device)

    def read(index: int, gradient: torch.Tensor) -> None:
        flat = gradient.float().flatten()
        weight = slots[index].read().detach().float().flatten()
        found[index, 0] = (flat * weight).abs().sum()
        found[index, 1] = torch.dot(flat, flat)
        for level, change in enumerate(changes.of(index)):
            product = flat * change.flatten()
            found[index, OF_PASS + level] = product.abs().sum()
            found[index, OF_PASS + longest + level] = product.sum().double().square()

    visit_gradients(evaluator.anatomy, slots, ids, loss=next_tokens, visit=read)
    return found


def synflow_numbers(evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor) -> torch.Tensor:
    """Return Σ ∂R/∂W ⊙ W by slot in a model of the layers' absolute weights, R the sum of its logits, shape (slots,).

    Args:
        evaluator: Has the dense model.
        slots: The layers.
        ids: Token ids (rows, seq_len).
    """
    found = torch.zeros(len(slots), dtype=torch.float64, device=evaluator.anatomy.device)

    def read(index: int, gradient: torch.Tensor) -> None:
        found[index] = (gradient.float() * slots[index].read().detach().float()).sum()

    with replaced_weights(slots, {slot.name: slot.read().detach().abs() for slot in slots}):
        visit_gradients(evaluator.anatomy, slots, ids, loss=lambda logits, _: logits.sum() / logits.numel(), visit=read)
    return found


def activation_numbers(anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor) -> torch.Tensor:
    """Return entropy in nats, and mean square, of the inputs of each slot, shape (slots, 2).

    The entropy is that of a histogram of all values between their least and their largest.

    Args:
        anatomy: The dense model.
        slots: The layers.
        ids: Token ids (rows, seq_len).
    """
    found = torch.zeros(len(slots), 2, dtype=torch.float64, device=anatomy.device)

    def read(index: int, inputs: torch.Tensor) -> None:
        values = inputs.detach().float().flatten()
        shares = torch.histc(values.cpu(), BINS).double() / len(values)
        found[index, 0] = torch.special.entr(shares).sum()
        found[index, 1] = values.square().mean()

    with ExitStack() as stack, torch.no_grad():
        for index, slot in enumerate(slots):
            stack.callback(slot.watch_inputs(partial(read, index)).remove)
        anatomy.model(**anatomy.arguments(ids), use_cache=False)
    return found


def proxy_tables(
    evaluator: Evaluator,
    problem: Problem,
    slots: Sequence[Slot],
    *,
    gradients: Numbers,
    synflow: Numbers,
    activations: Numbers,
) -> dict[str, Table]:
    """Return all proxies by name, each of shape (units, longest ladder), the same at every level where it knows none.

    Those of tied layers are their sum, of activations their mean. Columns that a store lacks are left out.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        slots: Of their layers, in order.
        gradients: Mean over passes of ``gradient_numbers``.
        synflow: ``synflow_numbers``.
        activations: ``activation_numbers``.
    """
    owner = np.repeat(np.arange(len(problem.units)), [len(unit.layers) for unit in problem.units])
    layers = np.bincount(owner).astype(np.float64)
    longest = problem.costs.shape[1]

    def summed(numbers: Numbers) -> Numbers:
        total = np.zeros((len(problem.units), *numbers.shape[1:]))
        np.add.at(total, owner, numbers)
        return total

    of_changes = summed(_squared_changes(evaluator, slots, longest))
    of_weights = summed(np.array([[float(slot.read().float().square().sum())] for slot in slots]))
    sums = summed(gradients)
    means = summed(activations) / layers[:, None]
    tables = {
        "weight_change": of_changes,
        "relative_weight_change": of_changes / of_weights,
        "snip_change": sums[:, OF_PASS : OF_PASS + longest],
        "fisher_change": sums[:, OF_PASS + longest :],
        "snip": sums[:, :1],
        "fisher_trace": sums[:, 1:2] / problem.numels[:, None],
        "synflow": summed(synflow)[:, None],
        "activation_entropy": means[:, :1],
        "activation_square": means[:, 1:],
        "weight_square": of_weights,
        "size": problem.numels[:, None].astype(np.float64),
        "bits_per_weight": np.maximum(problem.costs, 0) / problem.numels[:, None],
        **_of_the_store(problem),
    }
    return {name: np.broadcast_to(table, problem.costs.shape).astype(np.float64) for name, table in tables.items()}


def _squared_changes(evaluator: Evaluator, slots: Sequence[Slot], longest: int) -> Numbers:
    """Return ‖W − Ŵ‖² of every level of every slot, shape (slots, longest ladder)."""
    changes = Changes(evaluator, slots)
    found = np.zeros((len(slots), longest))
    for index in range(len(slots)):
        for level, change in enumerate(changes.of(index)):
            found[index, level] = float(change.square().sum())
    return found


def _of_the_store(problem: Problem) -> dict[str, Table]:
    """Return the proxies that are columns of the store: layer errors, OWL's outlier ratio."""
    tables: dict[str, Table] = {}
    for name in ("error", "relative_error"):
        values = [[getattr(level, name) for level in unit.levels] for unit in problem.units]
        if all(value is not None for row in values for value in row):
            table = np.zeros(problem.costs.shape)
            for index, row in enumerate(values):
                table[index, : len(row)] = row
            tables[name] = table
    if all(OUTLIERS in unit.columns for unit in problem.units):
        tables["outlier_ratio"] = np.array([[unit.columns[OUTLIERS]] for unit in problem.units])
    return tables


def with_bits(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Return each proxy so that the sum over units of its numbers ranks allocations: the higher, the larger the loss.

    A proxy that differs by level does so already. One that has the same number for all levels of a unit, as an outlier
    ratio has, becomes −number · bits per weight of the level.

    Args:
        tables: Proxy -> numbers, shape (units, levels) or (units, 1); ``bits_per_weight`` among them is left out.
    """
    bits = tables["bits_per_weight"]
    flat = {name: bool((table == table[:, :1]).all()) for name, table in tables.items()}
    return {name: -table * bits if flat[name] else table for name, table in tables.items() if table is not bits}
