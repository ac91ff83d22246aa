"""Bias tuning (Hubara et al., arXiv 2006.10518, section 3.4) of the winner, and of what language models have instead.

Language models have few biases; the gains of their norms take the place of the paper's batch-norm statistics. None of
these belongs to a unit, and their number and type stay as they are, so no bit is added.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.events import Progress
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.finish.base import Finished
from evosweep.fitness.base import Fitness, Outputs
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved
from evosweep.models.patch import replaced_weights
from evosweep.models.sublayers import silenced
from evosweep.store.units import Units

LEARNABLE = ("norms", "biases")
SEARCH_TOKENS = 8192  # on which the tuned model must be better
SMALLEST_STEP = 1e-2  # what a parameter of zeros counts as, for the size of its steps


class BiasTuning:
    """Learns biases and norm gains of the winner by Adam on its KL to the dense model, through all of its blocks.

    What is learned on calibration tokens is kept only if the KL on search tokens is lower with it.

    Args:
        steps: Of Adam; their size falls linearly to zero.
        tokens: Calibration tokens a step, rounded to whole windows.
        rate: Size of a step, as a share of each parameter tensor's root mean square.
        learn: ``norms``, ``biases``, or both.
    """

    def __init__(
        self, *, steps: int = 60, tokens: int = 512, rate: float = 0.01, learn: Sequence[str] = LEARNABLE
    ) -> None:
        self.steps = check_int("steps", steps, low=1)
        self.tokens = check_int("tokens", tokens, low=1)
        self.rate = check_number("rate", rate, low=0, high=1, exclusive=True)
        self.learn = [learn] if isinstance(learn, str) else list(learn)
        for name in self.learn:
            check_choice("learn", name, LEARNABLE)
        if not self.learn:
            raise SettingError("learn", allowed=f"some of {', '.join(LEARNABLE)}", got=self.learn)

    def check(self, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError, before any work, where a model cannot be tuned."""
        if units is not None and units.any:
            hint = "it learns with the dense embedding and head: units=none"
            raise SettingError("", owner=self, allowed=["none"], got="bias_tuning", hint=hint)
        if not anatomy.head.linear:
            raise SettingError(
                "", owner=self, allowed=["none"], got="bias_tuning", hint="this model's head is more than one matrix"
            )
        if any(parameter.device != anatomy.device for parameter in anatomy.model.parameters()):
            raise SettingError("", owner=self, allowed=["none"], got="bias_tuning", hint="it needs model.offload=false")
        if not self.parameters(anatomy):
            raise SettingError("learn", owner=self, allowed="something that this model has", got=self.learn)

    def parameters(self, anatomy: Anatomy) -> dict[str, nn.Parameter]:
        """Return what is learned, by name: vectors of the base model, none of the head's."""
        head = {id(anatomy.head.weight), id(anatomy.head.bias)}
        found = {}
        for name, parameter in anatomy.model.named_parameters():
            kind = "biases" if name.endswith("bias") else "norms"
            if parameter.dim() == 1 and kind in self.learn and id(parameter) not in head:
                found[name] = parameter
        return found

    def run(self, genome: Genome, *, problem: Problem, evaluator: Evaluator, seed: int, progress: Progress) -> Finished:
        """Return the tuned parameters, if they are better on search tokens, and figures of before and after.

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            seed: Chooses the order of calibration windows.
            progress: Shows how far it is.
        """
        began = time.monotonic()
        before = _figures(evaluator, genome)
        tuned = self._learn(Winner(genome, problem, evaluator), seed=seed, progress=progress)
        seconds = time.monotonic() - began
        with evaluator.tuned(tuned):
            after = _figures(evaluator, genome)
        accepted = after["search_kl"] < before["search_kl"]
        if not accepted:
            after = before
        facts: dict[str, Any] = {"accepted": accepted, "seconds": round(seconds, 2), "added_bits": 0}
        for name in before:
            facts |= {f"{name}_before": before[name], f"{name}_after": after[name]}
        facts["parameters"] = sum(value.numel() for value in tuned.values()) if accepted else 0
        progress.say(_verdict(facts))
        return Finished(tuned if accepted else {}, facts)

    def _learn(self, winner: Winner, *, seed: int, progress: Progress) -> dict[str, torch.Tensor]:
        """Return the learned parameters in the model's type; the model itself is left as it was."""
        anatomy = winner.evaluator.anatomy
        windows = winner.evaluator.splits["calibration"].windows
        batches = self._batches(len(windows), windows.shape[1], seed)
        used = sorted({int(window) for batch in batches for window in batch})
        anatomy.forget_contexts()
        targets = _targets(anatomy, windows, used)
        parameters = self.parameters(anatomy)
        with _compressed(winner), _learnable(anatomy.model, parameters) as masters:
            adam = torch.optim.Adam(
                [{"params": [value], "lr": self.rate * _size(value)} for value in masters.values()], betas=(0.9, 0.99)
            )
            falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=self.steps)
            for batch in progress.track(batches, description="tuning biases and norms"):
                loss = _backward(winner, moved(windows[batch], anatomy.device), [targets[int(n)] for n in batch])
                for name, parameter in parameters.items():
                    masters[name].grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
                adam.step()
                falling.step()
                _copy(masters, parameters)
                progress.note({"kl": f"{loss:.4f}"})
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def _batches(self, count: int, seq_len: int, seed: int) -> list[Any]:
        """Return the calibration windows of every step: all windows in random order, as often as steps ask."""
        size = min(count, max(1, self.tokens // seq_len))
        epochs = math.ceil(self.steps * size / count)
        order = [w for epoch in range(epochs) for w in generator(seed, "finish", epoch).permutation(count)]
        return [order[step * size : (step + 1) * size] for step in range(self.steps)]


def _verdict(facts: Mapping[str, Any]) -> str:
    """Return what was won, in one line."""
    if not facts["accepted"]:
        return "finish: tuned biases and norms were no better on search tokens, the winner stays as it was"
    return (
        f"finish: kl {facts['kl_before']:.4f} -> {facts['kl_after']:.4f}, ppl {facts['ppl_before']:.2f} -> "
        f"{facts['ppl_after']:.2f} on validation, {facts['parameters']} parameters in {facts['seconds']:.0f} s"
    )


def _figures(evaluator: Evaluator, genome: Genome) -> dict[str, float]:
    """Return KL and perplexity on validation, and the KL on some search tokens, evenly spaced."""
    search = evaluator.splits["search"]
    count = min(len(search.windows), max(1, SEARCH_TOKENS // search.seq_len))
    some = [index * len(search.windows) // count for index in range(count)]
    found: dict[str, float] = {}
    measures: list[Fitness] = [KL(), Perplexity()]
    whole = range(len(evaluator.splits["validation"].windows))
    for split, chosen, prefix in (("validation", whole, ""), ("search", some, "search_")):
        values = evaluator.score(genome[None], split=split, windows=chosen, fitness=measures)
        found |= {f"{prefix}{name}": float(value[0]) for name, value in values.items()}
    return found


@torch.no_grad()
def _targets(anatomy: Anatomy, windows: Any, used: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Return the dense model's targets of KL for every window that is used, in host memory."""
    found = {}
    for index in used:
        tokens = moved(windows[index][None], anatomy.device)
        final = anatomy.run(tokens)[0, :-1]
        targets = KL().targets(Outputs(anatomy.head, final, tokens[0, 1:]))
        found[index] = {name: value.cpu() for name, value in targets.items()}
    return found


def _backward(winner: Winner, tokens: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Add the gradient of the KL's mean over tokens to the parameters; return that mean.

    With q the compressed model's distribution, the gradient of KL by its final hidden state is Wᵀq − Wᵀp: what the
    fitness keeps of the dense model, of both models.

    Args:
        winner: Its weights are in the model.
        tokens: Token ids (windows, seq_len).
        targets: Of each window.
    """
    anatomy = winner.evaluator.anatomy
    whole = {block for effect in winner.dropped if effect.whole for block in effect.blocks}
    with torch.enable_grad():
        final = anatomy.run(tokens, without=whole)
    at_head = torch.zeros_like(final)
    total = 0.0
    count = final[:, 1:, 0].numel()
    for index, wanted in enumerate(targets):
        states = final[index, :-1].detach()
        own = KL().targets(Outputs(anatomy.head, states, tokens[index, 1:]))
        row, constant = (wanted[name].to(states.device).float() for name in ("mean_row", "constant"))
        at_head[index, :-1] = ((own["mean_row"].float() - row) / count).to(final.dtype)
        total += float(((states.float() * (own["mean_row"].float() - row)).sum(1) + constant - own["constant"]).sum())
    final.backward(at_head)
    return total / count


@contextmanager
def _compressed(winner: Winner) -> Iterator[None]:
    """Keep the winner's weights in the model while the context lasts; dropped sub-blocks give zeros."""
    evaluator = winner.evaluator
    weights = {slot.name: evaluator.weight(index, int(winner.genome[index])) for slot, index in winner.slots.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(replaced_weights(list(winner.slots), weights))
        for effect in winner.dropped:
            if effect.writer is not None:
                stack.enter_context(silenced(evaluator.anatomy.model.get_submodule(effect.writer)))
        yield


@contextmanager
def _learnable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Let some parameters alone have gradients while the context lasts, and yield fp32 copies; undo all changes."""
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    try:
        yield {name: value.float().clone() for name, value in before.items()}
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _size(value: torch.Tensor) -> float:
    """Return the root mean square of a parameter, never nearly zero."""
    return max(SMALLEST_STEP, float(value.square().mean().sqrt()))
