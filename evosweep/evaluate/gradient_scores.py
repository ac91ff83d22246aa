"""Scores of a backward pass: numbers that are read from each layer's gradient while it is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from evosweep.evaluate.backward import Outputs, next_tokens, sampled_labels, visit_gradients, visit_outputs
from evosweep.evaluate.hessian import hutchinson, input_products
from evosweep.evaluate.population import Evaluator
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import Slot

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
        flat = gradient.float().flatten()
        for level, change in enumerate(changes.of(index)):
            found[index, level] = torch.dot(flat, change.flatten()).double().square()

    visit_gradients(evaluator.anatomy, slots, ids, loss=sampled_labels(order["seed"]), visit=add)
    return found


def absolute_products(
    evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]
) -> torch.Tensor:
    """Return Σ |g ⊙ (W − Ŵ)| for one level of every slot, shape (slots, longest ladder); 0 for all other levels.

    g is the gradient of the text's own loss, in a model whose layers are all at that level.

    Args:
        evaluator: Has the dense model and the levels.
        slots: Whose weights the gradient is taken of.
        ids: Token ids (rows, seq_len).
        order: Its ``level`` is an index; a shorter ladder is at its highest.
    """
    changes = Changes(evaluator, slots)
    found = changes.zeros()
    weights = changes.at(order["level"])
    with replaced_weights(slots, weights) as dense:

        def add(index: int, gradient: torch.Tensor) -> None:
            change = slots[index].read().detach().float() - dense[slots[index].name].float()
            found[index, changes.number(index, order["level"])] = (gradient.float() * change).abs().sum()

        visit_gradients(evaluator.anatomy, slots, ids, loss=next_tokens, visit=add)
    return found


def output_squares(
    evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]
) -> torch.Tensor:
    """Return Σ (∂loss/∂Y)² ⊙ (ΔY)² for every level of every slot, shape (slots, longest ladder), Y a layer's outputs.

    Args:
        evaluator: Has the dense model and the levels.
        slots: Linear layers, embedding or head.
        ids: Token ids (rows, seq_len).
        order: Not used.

    Raises:
        ModelError: A slot is one expert of several, whose outputs are not seen.
    """
    del order
    changes = Changes(evaluator, slots)
    found = changes.zeros()

    def add(index: int, outputs: Outputs) -> None:
        inputs, gradient = outputs
        squares = gradient.flatten(0, -2).float().square()
        for level, change in enumerate(changes.of(index)):
            weight = change.to(gradient.dtype)  # multiplied as the model multiplies
            changed = weight[inputs.flatten()] if inputs.dtype is torch.long else inputs.flatten(0, -2) @ weight.T
            found[index, level] += (squares * changed.float().square()).sum(dtype=torch.float64)

    visit_outputs(evaluator.anatomy, slots, ids, loss=next_tokens, visit=add)
    return found


def sign_products(
    evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]
) -> torch.Tensor:
    """Return vᵀ H v by slot, shape (slots,), for one vector v of signs and the Hessian H of the KL.

    Args:
        evaluator: Has the dense model.
        slots: The layers.
        ids: Token ids (rows, seq_len).
        order: Its ``seed`` chooses the signs.
    """
    return hutchinson(evaluator.anatomy, slots, ids, order["seed"])


def input_sign_products(
    evaluator: Evaluator, slots: Sequence[Slot], ids: torch.Tensor, order: Mapping[str, Any]
) -> torch.Tensor:
    """Return vᵀ H v a value, and Σ (Q(x) − x)², of the inputs x of each slot, shape (slots, 2).

    v are signs, H is the KL's Hessian in the inputs, and Q rounds them as ``evaluate.activations`` says.

    Args:
        evaluator: Has the dense model, and rounds inputs.
        slots: The layers.
        ids: Token ids (rows, seq_len).
        order: Its ``seed`` chooses the signs.
    """
    assert evaluator.inputs is not None
    found = torch.zeros(len(slots), 2, dtype=torch.float64, device=ids.device)
    for index, (inputs, product) in enumerate(input_products(evaluator.anatomy, slots, ids, order["seed"])):
        change = evaluator.inputs.rounded(slots[index].name, inputs).float() - inputs.float()
        found[index, 0] = product / inputs.numel()
        found[index, 1] = change.square().sum()
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

    def number(self, index: int, level: int) -> int:
        """Return the index of a level in a slot's ladder, the highest where the ladder is shorter."""
        return min(level, self.ladders[index][1] - 1)

    def at(self, level: int) -> dict[str, torch.Tensor]:
        """Return the weight of every slot at a level, by name."""
        return {
            slot.name: self.evaluator.weight(self.ladders[index][0], self.number(index, level))
            for index, slot in enumerate(self.slots)
        }


SCORES: Mapping[str, Score] = {
    "squares": squares,
    "squared_products": squared_products,
    "absolute_products": absolute_products,
    "output_squares": output_squares,
    "hutchinson": sign_products,
    "input_hutchinson": input_sign_products,
}
