"""The curvature of the loss in each layer's weights, which HAWQ-V2's estimate of harm needs."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

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
TOGETHER = 16384  # most tokens in one backward pass


def hawq_v2(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return ½ · mean Hessian eigenvalue · ‖W − Ŵ‖² of every unit at every level (HAWQ-V2, arXiv 1911.03852, eq. 9).

    That of tied layers is the sum of theirs.

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

    def of(draw: int) -> list[float]:
        ids = moved(split.windows[passes[draw]], anatomy.device)
        labels_seed = int(generator(seed, "labels", draw).integers(2**31))
        squares: list[float] = _squared_gradients(anatomy, mine, ids, labels_seed).tolist()
        return squares

    found = (steps or Steps()).run(range(len(passes)), of, progress=progress, description="measuring curvature")
    squares = np.zeros(len(mine))
    for of_pass in found:  # in their order: the sum is rounded as it always is
        squares += of_pass
    traces = (squares / (count * seq_len)).tolist()  # a token
    stored = {unit.name: index for index, unit in enumerate(evaluator.store.units)}
    harms: dict[str, dict[str, float]] = {}
    for layer, slot, trace in zip(layers, mine, traces, strict=True):
        dense = slot.read().float()
        harms[layer.name] = {
            f"{HAWQ}/{level.name}": 0.5
            * trace
            / layer.numel
            * float((evaluator.weight(stored[layer.name], number).float() - dense).square().sum())
            for number, level in enumerate(layer.levels)
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
