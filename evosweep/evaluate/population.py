"""Score a whole population of genomes at once: candidates are a batch axis through the model's own blocks.

Block by block, candidates that agree on every level so far share one row of activations; inside a linear layer,
rows are grouped by level. So each (unit, level) weight is touched at most once a block for the whole population.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evosweep.core.checks import check_bool, check_int, check_number
from evosweep.core.lru import ByteLRU
from evosweep.core.problem import Genome, Problem
from evosweep.data.tokens import TokenSplit
from evosweep.fitness.base import Fitness, Outputs
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.device import tf32
from evosweep.models.patch import replaced_forward
from evosweep.store.manifest import LevelStore

Genomes = npt.NDArray[np.int64]
ACTIVATION_COPIES = 12  # hidden-sized tensors alive in a block per row: residual, q/k/v, gate, up, scores ...


class Resources:
    """What scoring may take.

    Args:
        activations_gb: Most that a block's activations may take; larger populations go in parts.
        weights_gb: Most that dequantized weights may take; those used last are kept.
        targets_gb: Most that the dense model's remembered outputs may take.
        tf32: Whether CUDA may multiply fp32 matrices in TF32.
        sensitivity_tokens: Tokens that each unit is measured on, for samplers that need it.
    """

    def __init__(
        self,
        *,
        activations_gb: float = 1.0,
        weights_gb: float = 2.0,
        targets_gb: float = 0.5,
        tf32: bool = True,
        sensitivity_tokens: int = 1024,
    ) -> None:
        self.activations = 1e9 * check_number("evaluate.activations_gb", activations_gb, low=0, exclusive=True)
        self.weights = 1e9 * check_number("evaluate.weights_gb", weights_gb, low=0)
        self.targets = 1e9 * check_number("evaluate.targets_gb", targets_gb, low=0)
        self.tf32 = check_bool("evaluate.tf32", tf32)
        self.sensitivity_tokens = check_int("evaluate.sensitivity_tokens", sensitivity_tokens, low=1)


class Evaluator:
    """A model, its level store, and token splits: gives the fitness of genomes.

    Args:
        anatomy: The dense model; its weights are never changed.
        store: Levels of its units; genomes index them.
        splits: Token windows by split name.
        resources: What scoring may take.
    """

    def __init__(
        self,
        *,
        anatomy: Anatomy,
        store: LevelStore,
        splits: Mapping[str, TokenSplit],
        resources: Resources | None = None,
    ) -> None:
        self.anatomy, self.store, self.splits = anatomy, store, splits
        self.resources = resources or Resources()
        self._weights: ByteLRU[torch.Tensor] = ByteLRU(limit=self.resources.weights, size=_bytes)
        self._targets: ByteLRU[dict[str, torch.Tensor]] = ByteLRU(
            limit=self.resources.targets, size=lambda parts: sum(map(_bytes, parts.values()))
        )
        self._blocks = _units_by_block(anatomy, store)
        self._gates = Problem(units=store.units, budget=sum(unit.levels[-1].cost for unit in store.units))

    def score(
        self, genomes: Genomes | None, *, split: str, windows: Sequence[int], fitness: Sequence[Fitness]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return each fitness of each genome, by name, shape (genomes,).

        Args:
            genomes: Level indices, shape (genomes, units); None scores the dense model, as one genome. What a dropped
                unit gates is not looked at.
            split: Name of the token split.
            windows: Which of its windows.
            fitness: What to compute; all share one pass over the head.
        """
        chosen = self.splits[split].windows[np.asarray(windows, dtype=np.int64)]
        if genomes is not None and self._gates.gating.any():  # alike where it matters shall be alike
            genomes = np.stack([np.where(self._gates.alive(genome), genome, 0) for genome in genomes])
        sums = {each.name: np.zeros(1 if genomes is None else len(genomes)) for each in fitness}
        with torch.inference_mode(), tf32(allowed=self.resources.tf32):
            dense = [self._dense(split, int(window), fitness, losses=genomes is None) for window in windows]
            if genomes is None:
                for losses in dense:
                    for name in sums:
                        sums[name] += float(losses[name]["loss"].sum(dtype=torch.float64))
            else:
                for part, span in self._parts(len(genomes), chosen.shape):
                    for name, values in self._losses(genomes[part], chosen[span], fitness, dense[span]).items():
                        sums[name][part] += values
        count = len(chosen) * (chosen.shape[1] - 1)
        return {each.name: np.array([each.reduce(s / count) for s in sums[each.name]]) for each in fitness}

    def logits(self, genome: Genome | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) of one genome for one row of token ids (1, tokens)."""
        with torch.inference_mode():
            hidden, _ = self._hidden(None if genome is None else genome[None], tokens.to(self.anatomy.device))
            return self.anatomy.head.logits(hidden[0].flatten(0, 1))

    def weight(self, place: int, level: int) -> torch.Tensor:
        """Return the weight (out, in) of a level of the unit at ``place``, on the model's device in its type."""
        unit = self.store.units[place]

        def make() -> torch.Tensor:
            dense = self.store.weight(unit.name, unit.levels[level].name, device=self.anatomy.device)
            return dense.to(self.anatomy.dtype)

        return self._weights.get((place, level), make)

    def _losses(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return summed losses of each genome over some windows."""
        tokens = torch.from_numpy(windows).to(self.anatomy.device)
        hidden, rows = self._hidden(genomes, tokens)
        sums = {each.name: torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device) for each in fitness}
        for place, window in enumerate(tokens):
            for row, states in enumerate(hidden[:, place]):
                outputs = Outputs(self.anatomy.head, states[:-1], window[1:])
                for each in fitness:
                    sums[each.name][row] += each.losses(outputs, targets[place][each.name]).sum(dtype=torch.float64)
        return {name: values.cpu().numpy()[rows] for name, values in sums.items()}

    def _hidden(self, genomes: Genomes | None, tokens: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Run the population.

        Returns:
            Final hidden states (distinct genomes, windows, seq_len, hidden), and each genome's row in them.
        """
        anatomy = self.anatomy
        states = anatomy.embed(tokens)[None]
        rows = np.zeros(1 if genomes is None else len(genomes), dtype=np.int64)
        for block, units in enumerate(self._blocks):
            if genomes is None:
                states = anatomy.run_block(block, states.flatten(0, 1)).unflatten(0, states.shape[:2])
                continue
            keys = np.concatenate([rows[:, None], genomes[:, units.places]], axis=1)
            distinct, rows = np.unique(keys, axis=0, return_inverse=True)
            if len(distinct) != len(states) or (distinct[:, 0] != np.arange(len(states))).any():
                states = states[torch.from_numpy(distinct[:, 0]).to(states.device)]
            states = self._run_block(block, states, dict(zip(units.places.tolist(), distinct[:, 1:].T, strict=True)))
        final = anatomy.finish(tokens.repeat(len(states), 1), states.flatten(0, 1))
        return final.unflatten(0, states.shape[:2]), rows

    def _run_block(
        self, block: int, states: torch.Tensor, levels: Mapping[int, npt.NDArray[np.int64]]
    ) -> torch.Tensor:
        """Run one block on states (rows, windows, seq_len, hidden), each row at its own levels (by unit's place)."""
        units = self._blocks[block]
        there = np.ones(len(states), dtype=bool)
        for place in units.whole:
            there &= levels[place] > 0
        if not there.any():
            return states
        rows = torch.from_numpy(np.flatnonzero(there)).to(states.device)
        given = states if there.all() else states[rows]
        with ExitStack() as routes:
            for site, place in units.sites.items():
                routes.enter_context(replaced_forward(site.module, self._router(site, place, levels[place][there])))
            for site, place in units.writers.items():
                gone = np.flatnonzero(levels[place][there] == 0)
                if len(gone):
                    routes.enter_context(replaced_forward(site.module, _without(site.module, gone, len(given))))
            done = self.anatomy.run_block(block, given.flatten(0, 1)).unflatten(0, given.shape[:2])
        return done if there.all() else states.index_copy(0, rows, done)

    def _router(self, site: Site, place: int, levels: npt.NDArray[np.int64]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a forward that uses, for each row of the population, the weight of that row's level."""
        groups = [
            (self.weight(place, int(level)), torch.from_numpy(np.flatnonzero(levels == level)).to(self.anatomy.device))
            for level in np.unique(levels)
        ]
        return _route(groups, len(levels), site.module)

    def _dense(
        self, split: str, window: int, fitness: Sequence[Fitness], *, losses: bool
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return what each fitness remembers of the dense model on one window, and if asked the dense ``loss``.

        The dense model runs at most once, and not at all where everything is remembered.
        """

        @functools.cache
        def outputs() -> Outputs:
            tokens = torch.from_numpy(self.splits[split].windows[window][None]).to(self.anatomy.device)
            hidden, _ = self._hidden(None, tokens)
            return Outputs(self.anatomy.head, hidden[0, 0, :-1], tokens[0, 1:])

        found = {}
        for each in fitness:
            targets = self._targets.get((each.name, split, window), functools.partial(_remember, each, outputs))
            found[each.name] = {**targets, "loss": each.losses(outputs(), targets)} if losses else targets
        return found

    def _parts(self, rows: int, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """Cut (genomes, windows) into parts whose activations fit, whole populations first."""
        window = shape[1] * self.anatomy.head.weight.shape[1] * 4 * ACTIVATION_COPIES
        at_once = max(1, int(self.resources.activations / window))
        some_rows = min(rows, at_once)
        some_windows = max(1, at_once // some_rows)
        return [
            (slice(row, min(row + some_rows, rows)), slice(start, min(start + some_windows, shape[0])))
            for start in range(0, shape[0], some_windows)
            for row in range(0, rows, some_rows)
        ]


@dataclass(frozen=True)
class _Units:
    """Units that bear on one block, as places in a genome.

    Attributes:
        sites: Place of each linear layer that is a unit.
        writers: Place of the unit that drops a sub-block, by the layer whose output is then missing.
        whole: Places of units that drop the whole block.
    """

    sites: Mapping[Site, int]
    writers: Mapping[Site, int]
    whole: tuple[int, ...]

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        return np.array([*self.sites.values(), *self.writers.values(), *self.whole], dtype=np.int64)


def _units_by_block(anatomy: Anatomy, store: LevelStore) -> list[_Units]:
    places = {unit.name: place for place, unit in enumerate(store.units)}
    found = []
    for block in range(len(anatomy.blocks)):
        sites = {site.name: site for site in anatomy.sites_of(block)}
        drops = {place: drop for place, drop in store.drops.items() if block in drop["blocks"]}
        found.append(
            _Units(
                sites={site: places[name] for name, site in sites.items() if name in places},
                writers={sites[drop["writer"]]: place for place, drop in drops.items() if not drop["whole"]},
                whole=tuple(place for place, drop in drops.items() if drop["whole"]),
            )
        )
    return found


def _without(module: nn.Module, gone: npt.NDArray[np.int64], rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that says nothing for some rows of the population."""
    forward = module.forward

    def quiet(inputs: torch.Tensor) -> torch.Tensor:
        outputs = forward(inputs)
        return outputs.view(rows, -1).index_fill(0, torch.from_numpy(gone).to(outputs.device), 0).view(outputs.shape)

    return quiet


def _route(
    groups: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int, module: nn.Module
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward for inputs whose first dimension is the population's rows times the batch."""
    bias: Any = module.bias

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if len(groups) == 1:
            return functional.linear(inputs, groups[0][0], bias)
        by_row = inputs.view(rows, -1, inputs.shape[-1])
        outputs = by_row.new_empty((*by_row.shape[:-1], len(groups[0][0])))
        for weight, members in groups:
            outputs[members] = functional.linear(by_row[members], weight, bias)
        return outputs.view(*inputs.shape[:-1], -1)

    return forward


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _remember(fitness: Fitness, dense: Callable[[], Outputs]) -> dict[str, torch.Tensor]:
    return fitness.targets(dense())
