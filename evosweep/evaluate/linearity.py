"""HIGGS's linearity model: the KL is a sum over layers of a constant times the squared relative error of the weight."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from evosweep.allocators.harm import BROKEN, HIGGS, HIGGS_DATA
from evosweep.core.events import Progress
from evosweep.core.problem import Problem
from evosweep.core.seeds import generator
from evosweep.evaluate.curvature import by_level
from evosweep.evaluate.gradient_scores import Changes
from evosweep.evaluate.passes import layers_with_gradients
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.steps import Steps
from evosweep.fitness.base import Outputs
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import OuterSlot, Slot

NOISES = (0.02, 0.08)  # t²: about what 4 and 2 to 3 bits change in a weight
Ids = npt.NDArray[np.int64]


def higgs(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return α t² of every level of every unit (HIGGS, arXiv 2411.17525), α measured on random tokens: no text.

    t² = ‖Ŵ − W‖² / ‖W‖²; α is the slope of the KL in t² where Gaussian noise is added to that layer alone, by least
    squares through the origin over the noises t² of ``NOISES``: the linearity theorem says that the KL is Σ α t².
    Differs from HIGGS in that t² is each stored level's own error, where HIGGS knows that of its grids beforehand, and
    in the number of noises; selection is exact in both.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: Random tokens for each unit and noise.
        seed: Chooses tokens and noise.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.
    """
    seq_len = evaluator.splits["search"].windows.shape[1]
    vocabulary = len(evaluator.anatomy.outer["embedding"].read())
    ids = generator(seed, "random tokens").integers(vocabulary, size=(max(1, tokens // seq_len), seq_len))
    return _harms(HIGGS, evaluator, problem, ids, seed=seed, progress=progress, steps=steps or Steps())


def higgs_data(
    evaluator: Evaluator, problem: Problem, *, tokens: int, seed: int, progress: Progress, steps: Steps | None = None
) -> dict[str, dict[str, float]]:
    """Return what ``higgs`` does, α measured on windows of the search split.

    Args:
        evaluator: Has the dense model and the levels.
        problem: Units.
        tokens: Tokens of text for each unit and noise.
        seed: Chooses windows and noise.
        progress: Shows how far it is.
        steps: Keeps what is done; None: nothing.
    """
    windows = evaluator.splits["search"].windows
    count = max(1, tokens // windows.shape[1])
    chosen = generator(seed, "sensitivity").choice(len(windows), min(count, len(windows)), replace=False)
    return _harms(HIGGS_DATA, evaluator, problem, windows[chosen], seed=seed, progress=progress, steps=steps or Steps())


def _harms(
    column: str, evaluator: Evaluator, problem: Problem, ids: Ids, *, seed: int, progress: Progress, steps: Steps
) -> dict[str, dict[str, float]]:
    """Return a column with α t² of every level of every unit, and α itself; that of tied layers is the sum of theirs.

    Args:
        column: Its name.
        evaluator: Has the dense model and the levels.
        problem: Units.
        ids: Token ids (windows, seq_len).
        seed: Chooses the noise.
        progress: Shows how far it is.
        steps: Keeps what is done.
    """
    slots = layers_with_gradients(evaluator, problem)
    changes = Changes(evaluator, slots)
    noised = NoisedKL(evaluator.anatomy, moved(ids, evaluator.anatomy.device))

    def of(index: int) -> float:
        seeds = generator(seed, "noise", slots[index].name).integers(2**31, size=len(NOISES))
        kl = [noised.of(slots[index], noise, int(one)) for noise, one in zip(NOISES, seeds, strict=True)]
        return fitted_slope(NOISES, kl)

    found = steps.run(range(len(slots)), of, progress=progress, description="noise in every layer")
    alphas = [float(value[0]) for value in found]
    numbers = {}
    for index, (slot, alpha) in enumerate(zip(slots, alphas, strict=True)):
        squares = float(slot.read().float().square().sum())
        numbers[slot.name] = [alpha * float(change.square().sum()) / squares for change in changes.of(index)]
    return by_level(column, problem, numbers)


def fitted_slope(noises: Sequence[float], kl: Sequence[float]) -> float:
    """Return the slope of the KL in t² by least squares through the origin, at least 0.

    Args:
        noises: t².
        kl: The KL at each.
    """
    squares = np.asarray(noises, dtype=np.float64)
    values = np.nan_to_num(np.asarray(kl, dtype=np.float64), nan=BROKEN, posinf=BROKEN)
    return max(0.0, float(squares @ values / (squares @ squares)))


class NoisedKL:
    """Mean KL from the dense model when one layer's weight is noised.

    Args:
        anatomy: The dense model.
        ids: Token ids (windows, seq_len); one window at a time runs.
    """

    def __init__(self, anatomy: Anatomy, ids: torch.Tensor) -> None:
        self.anatomy = anatomy
        self.ids = ids
        with torch.inference_mode():
            self._dense = [self._outputs(window) for window in ids]
            self._targets = [KL().targets(outputs) for outputs in self._dense]

    def of(self, slot: Slot, noise: float, seed: int) -> float:
        """Return the mean KL with Gaussian noise of squared relative norm ``noise`` in a slot's weight.

        Args:
            slot: The layer.
            noise: t².
            seed: Of the noise.
        """
        weight = noised_weight(slot.read().detach(), noise, seed)
        at_head = isinstance(slot, OuterSlot) and (slot.layout == "head" or slot.tied)
        head = self.anatomy.head.with_weight(weight) if at_head else None
        context: AbstractContextManager[object] = (
            slot.with_weight(weight) if isinstance(slot, OuterSlot) else replaced_weights([slot], {slot.name: weight})
        )
        with torch.inference_mode(), context:
            losses = []
            for window, dense, targets in zip(self.ids, self._dense, self._targets, strict=True):
                outputs = self._outputs(window)
                wanted = targets
                if head is not None:
                    wanted = KL().targets(replace(dense, other=head))
                    outputs = replace(outputs, head=head, other=self.anatomy.head)
                losses.append(float(KL().losses(outputs, wanted).mean(dtype=torch.float64)))
        return float(np.mean(losses))

    def _outputs(self, window: torch.Tensor) -> Outputs:
        hidden = self.anatomy.base(**self.anatomy.arguments(window[None]), use_cache=False)[0][0]
        return Outputs(self.anatomy.head, hidden, self.anatomy.pictures.plain(window))


def noised_weight(weight: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """Return a weight plus Gaussian noise whose squared norm is on average ``noise`` times the weight's.

    Args:
        weight: Any shape.
        noise: t².
        seed: Of the noise.
    """
    rng = torch.Generator(weight.device).manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=rng, device=weight.device)
    wide = weight.float()
    return (wide + drawn * (noise * wide.square().mean()).sqrt()).to(weight.dtype)
