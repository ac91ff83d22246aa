"""How curved the loss is in each layer's weights, for HAWQ-V2's model of harm."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from evosweep.allocators.harm import HAWQ
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.device import moved

BACKWARD = 3  # forward passes that a forward and a backward pass cost
PASSES = 32  # backward passes, if so many windows fit one
TOGETHER = 16384  # most tokens of one


def hawq_v2(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress
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

    Raises:
        EvosweepError: A unit is no layer's weight, or weights wait elsewhere than on the model's device.
    """
    anatomy, split = evaluator.anatomy, evaluator.splits["search"]
    sites = {site.name: site for site in anatomy.sites}
    strangers = [unit.name for unit in problem.units if unit.name not in sites]
    if strangers:
        raise EvosweepError(f"curvature is that of a layer's weight; {strangers[0]} is none")
    mine = [sites[unit.name] for unit in problem.units]
    if any(site.weight.device != anatomy.device for site in mine):
        raise EvosweepError("curvature needs all weights on the model's device: model.offload=false")
    seq_len = split.windows.shape[1]
    count = max(1, len(problem.units) * tokens // (BACKWARD * seq_len))
    windows = generator(seed, "curvature").integers(len(split.windows), size=count)
    together = max(1, min(math.ceil(count / PASSES), TOGETHER // seq_len))
    passes = [windows[start : start + together] for start in range(0, count, together)]
    squares = torch.zeros(len(mine), dtype=torch.float64, device=anatomy.device)
    for draw, chosen in enumerate(progress.track(passes, description="measuring curvature")):
        ids = moved(split.windows[chosen], anatomy.device)
        labels_seed = int(generator(seed, "labels", draw).integers(2**31))
        squares += _squared_gradients(anatomy, mine, ids, labels_seed)
    traces = (squares / (count * seq_len)).tolist()  # a token
    columns: dict[str, dict[str, float]] = {}
    for place, (unit, site, trace) in enumerate(zip(problem.units, mine, traces, strict=True)):
        dense = site.weight.float()
        columns[unit.name] = {
            f"{HAWQ}/{level.name}": 0.5
            * trace
            / unit.numel
            * float((evaluator.weight(place, number).float() - dense).square().sum())
            for number, level in enumerate(unit.levels)
        }
    return columns


def _squared_gradients(anatomy: Anatomy, sites: Sequence[Site], ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ‖∇ log p(y)‖² by layer, shape (sites,), at labels y that the model itself gives to ids (rows, seq_len)."""
    found = torch.zeros(len(sites), dtype=torch.float64, device=anatomy.device)

    def note(place: int, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        found[place] = weight.grad.float().square().sum()
        weight.grad = None  # never more than one layer's at a time

    rng = torch.Generator(anatomy.device).manual_seed(seed)
    with ExitStack() as stack, torch.enable_grad():
        for place, site in enumerate(sites):
            weight: torch.nn.Parameter = site.module.weight  # type: ignore[assignment]
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
            stack.callback(weight.register_post_accumulate_grad_hook(partial(note, place)).remove)
        logits = anatomy.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return found
