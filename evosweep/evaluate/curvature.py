"""The curvature of the loss in each layer's weights, which HAWQ-V2's estimate of harm needs."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from evosweep import parallel
from evosweep.allocators.harm import HAWQ
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved
from evosweep.models.slots import Slot

BACKWARD = 3  # a forward and a backward pass cost as much as so many forward passes
PASSES = 32  # number of backward passes, unless that puts more than TOGETHER tokens into one
SQUARES = "squares"  # name of an order
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
    anatomy = evaluator.anatomy
    split = evaluator.splits["search"]
    slots = {slot.name: slot for slot in anatomy.all_slots}
    layers = [layer for unit in problem.units for layer in unit.layers]
    others = [layer.name for layer in layers if layer.name not in slots]
    if others:
        raise EvosweepError(f"curvature is defined for a layer's weight; {others[0]} is not one")
    mine = [slots[layer.name] for layer in layers]
    if any(slot.parameter.device != anatomy.device for slot in mine):
        raise EvosweepError("curvature needs all weights on the model's device: model.offload=false")
    seq_len = split.windows.shape[1]
    count = max(1, len(problem.units) * tokens // (BACKWARD * seq_len))
    windows = generator(seed, "curvature").integers(len(split.windows), size=count)
    together = max(1, min(math.ceil(count / PASSES), TOGETHER // seq_len))
    passes = [windows[start : start + together] for start in range(0, count, together)]

    orders = [
        {"windows": chosen.tolist(), "seed": int(generator(seed, "labels", draw).integers(2**31))}
        for draw, chosen in enumerate(passes)
    ]
    ahead: dict[int, list[float]] = {}  # passes that other processes have made

    def of(draw: int) -> list[float]:
        if draw not in ahead:
            together = orders[draw : draw + (1 if evaluator.sharing is None else parallel.count())]
            ahead.update(enumerate(_passes(evaluator, [slot.name for slot in mine], together), start=draw))
        return ahead.pop(draw)

    found = (steps or Steps()).run(range(len(passes)), of, progress=progress, description="measuring curvature")
    squares = np.zeros(len(mine))
    for of_pass in found:  # in their order: the sum is rounded as it always is
        squares += of_pass
    traces = (squares / (count * seq_len)).tolist()  # a token
    by_layer = dict(zip([layer.name for layer in layers], traces, strict=True))
    return _harms(evaluator, problem, {slot.name: slot for slot in mine}, by_layer)


def _passes(evaluator: Evaluator, layers: Sequence[str], orders: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the squared gradients of some backward passes, of which every process makes one.

    Args:
        evaluator: Has the dense model.
        layers: Names of the layers.
        orders: Windows and seed of every pass.
    """
    facts = {"layers": list(layers), "passes": list(orders)}
    if len(orders) == 1:
        return [_squares(evaluator, facts, 0)]
    with parallel.asked(SQUARES, facts) as answers:
        own = _squares(evaluator, facts, 0)
    return [own, *(answer["squares"] for answer, _ in answers[: len(orders) - 1])]


def answer_squares(evaluator: Evaluator, facts: Mapping[str, Any]) -> parallel.Message:
    """Return the squared gradients of this process's backward pass, if there is one for it."""
    mine = parallel.rank() < len(facts["passes"])
    return {"squares": _squares(evaluator, facts, parallel.rank()) if mine else []}, {}


def _squares(evaluator: Evaluator, facts: Mapping[str, Any], number: int) -> list[float]:
    """Return the squared gradients of one pass, by layer."""
    slots = {slot.name: slot for slot in evaluator.anatomy.all_slots}
    order = facts["passes"][number]
    ids = moved(evaluator.splits["search"].windows[order["windows"]], evaluator.anatomy.device)
    mine = [slots[name] for name in facts["layers"]]
    squares: list[float] = _squared_gradients(evaluator.anatomy, mine, ids, order["seed"]).tolist()
    return squares


def _harms(
    evaluator: Evaluator, problem: Problem, slots: Mapping[str, Slot], traces: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return the harm of every unit's levels; that of tied layers is the sum of theirs.

    Args:
        evaluator: Has the levels.
        problem: Units.
        slots: Layers by name.
        traces: Trace of every layer's Hessian, a token.
    """
    stored = {unit.name: index for index, unit in enumerate(evaluator.store.units)}
    harms: dict[str, dict[str, float]] = {}
    for layer in (layer for unit in problem.units for layer in unit.layers):
        dense = slots[layer.name].read().float()
        errors = [
            float((evaluator.weight(stored[layer.name], number).float() - dense).square().sum())
            for number in range(len(layer.levels))
        ]
        half = 0.5 * traces[layer.name] / layer.numel
        harms[layer.name] = {
            f"{HAWQ}/{level.name}": half * error for level, error in zip(layer.levels, errors, strict=True)
        }
    return {
        unit.name: {name: sum(harms[layer.name][name] for layer in unit.layers) for name in harms[unit.layers[0].name]}
        for unit in problem.units
    }


def _squared_gradients(anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the squared norm of the gradient of log p(y) by slot, shape (slots,), at labels y drawn from the model.

    Args:
        anatomy: The dense model.
        slots: Whose weights the gradient is taken of.
        ids: Token ids (rows, seq_len).
        seed: Chooses the labels.
    """
    found = torch.zeros(len(slots), dtype=torch.float64, device=anatomy.device)

    def add(index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        found[index] = slots[index].view(parameter.grad).float().square().sum()
        parameter.grad = None  # so that never more than one layer's gradient is kept

    rng = torch.Generator(anatomy.device).manual_seed(seed)
    with ExitStack() as stack, torch.enable_grad():
        for index, slot in enumerate(slots):
            parameter = slot.parameter
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(add, index)).remove)
        logits = anatomy.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return found
