"""Score a whole population of genomes at once: candidates are a batch axis through the model's own blocks.

Block by block, candidates that agree on every level so far share one row of activations; inside a linear layer,
rows are grouped by level. So each (unit, level) weight is touched at most once a block for the whole population.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from evosweep.core.errors import EvosweepError
from evosweep.core.lru import ByteLRU
from evosweep.core.problem import Genome, Problem
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.levels import Levels, bytes_of
from evosweep.evaluate.memory import Resources, per_token, plan_memory
from evosweep.evaluate.routing import distinct_rows, groups_of, levels_in, routed, silent_rows
from evosweep.fitness.base import Fitness, Outputs, rows_at_once
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.device import moved, tf32
from evosweep.models.fused import compile_norms, fused_rotary
from evosweep.models.patch import replaced_forward
from evosweep.store.manifest import LevelStore

Genomes = npt.NDArray[np.int64]
logger = logging.getLogger(__name__)


class Evaluator:
    """A model, its level store, and token splits: gives the fitness of genomes.

    Args:
        anatomy: The dense model; its weights are never changed.
        store: Levels of its units; genomes index them.
        splits: Token windows by split name.
        resources: What scoring may take.

    Attributes:
        plan: How memory is shared out.
        validated: Figures of allocations on the whole validation split, by genome.
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
        self._blocks = _units_by_block(anatomy, store)
        self._gates = Problem(units=store.units, budget=sum(unit.levels[-1].cost for unit in store.units))
        longest = max(split.seq_len for split in splits.values())
        self.plan = plan_memory(self.resources, anatomy, store.units, seq_len=longest)
        self._tokens_at_once = int(self.plan.activations / per_token(anatomy))
        logger.debug("%s; %d tokens at once", self.plan, self._tokens_at_once)
        self.levels = Levels(store, device=anatomy.device, dtype=anatomy.dtype, plan=self.plan)
        self._targets: ByteLRU[dict[str, torch.Tensor]] = ByteLRU(
            limit=self.plan.targets, size=lambda parts: sum(map(bytes_of, parts.values()))
        )
        self.validated: dict[bytes | None, dict[str, float]] = {}
        self._compiled = self.resources.compiles(anatomy.device)
        if self._compiled:
            compile_norms(anatomy.blocks)

    def score(
        self, genomes: Genomes | None, *, split: str, windows: Sequence[int], fitness: Sequence[Fitness]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return each fitness of each genome, by name, shape (genomes,); arguments as for ``token_losses``."""
        losses = self.token_losses(genomes, split=split, windows=windows, fitness=fitness)
        return {
            each.name: np.array([each.reduce(mean) for mean in losses[each.name].mean(axis=(1, 2), dtype=np.float64)])
            for each in fitness
        }

    def token_losses(
        self,
        genomes: Genomes | None,
        *,
        split: str,
        windows: Sequence[int],
        fitness: Sequence[Fitness],
        length: int | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the loss of each genome on each token, by fitness, shape (genomes, windows, tokens - 1).

        Args:
            genomes: Level indices, shape (genomes, units); None scores the dense model, as one genome. What a dropped
                unit gates is not looked at.
            split: Name of the token split.
            windows: Which of its windows.
            fitness: What to compute; all share one pass over the head.
            length: Only so many tokens of each window, from its start.
        """
        chosen = self.splits[split].windows[np.asarray(windows, dtype=np.int64), :length]
        if genomes is not None and self._gates.gating.any():  # alike where it matters shall be alike
            genomes = np.stack([np.where(self._gates.alive(genome), genome, 0) for genome in genomes])
        with torch.inference_mode(), tf32(allowed=self.resources.tf32), self._fused():
            dense = [
                self._dense(split, int(window), fitness, chosen.shape[1], losses=genomes is None) for window in windows
            ]
            if genomes is None:
                return {
                    each.name: np.stack([found[each.name]["loss"].float().cpu().numpy() for found in dense])[None]
                    for each in fitness
                }
            return self._in_parts(genomes, chosen, fitness, dense)

    def logits(self, genome: Genome | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) of one genome for one row of token ids (1, tokens)."""
        with torch.inference_mode():
            hidden, _ = self._hidden(None if genome is None else genome[None], tokens.to(self.anatomy.device))
            return self.anatomy.head.logits(hidden[0].flatten(0, 1))

    def weight(self, place: int, level: int) -> torch.Tensor:
        """Return the weight (out, in) of a level of the unit at ``place``, on the model's device in its type."""
        return self.levels.weight((place, level))

    def _fused(self) -> AbstractContextManager[None]:
        return fused_rotary(self.anatomy.blocks) if self._compiled else nullcontext()

    def _in_parts(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return losses of a population, in as many parts as memory asks for."""
        shape = (len(genomes), len(windows), windows.shape[1] - 1)
        losses = {each.name: np.empty(shape, dtype=np.float32) for each in fitness}
        todo = self._parts(len(genomes), windows.shape)
        while todo:
            rows, span = todo.pop(0)
            try:
                found = self._losses(genomes[rows], windows[span], fitness, targets[span])
            except torch.OutOfMemoryError as error:
                todo = [*self._halved(rows, span, windows.shape[1], error), *todo]
                continue
            for name, values in found.items():
                losses[name][rows, span] = values
        return losses

    def _halved(
        self, rows: slice, span: slice, seq_len: int, error: torch.OutOfMemoryError
    ) -> list[tuple[slice, slice]]:
        """Return a part that did not fit, cut in two; what comes later is cut smaller from the start."""
        longer, other, cuts_rows = (rows, span, True) if rows.stop - rows.start > 1 else (span, rows, False)
        size = longer.stop - longer.start
        if size == 1:
            raise EvosweepError(
                f"one candidate on one window of {seq_len} tokens does not fit the device's memory; "
                "lower evaluate.memory_gb or tokens.seq_len"
            ) from error
        torch.cuda.empty_cache()
        self._tokens_at_once = max(seq_len, self._tokens_at_once // 2)
        logger.warning("out of memory; from now on %d tokens at once", self._tokens_at_once)
        middle = longer.start + size // 2
        halves = slice(longer.start, middle), slice(middle, longer.stop)
        return [(half, other) if cuts_rows else (other, half) for half in halves]

    def _losses(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the losses of each genome on each token of some windows."""
        tokens = moved(windows, self.anatomy.device)
        hidden, rows = self._hidden(genomes, tokens)
        losses = {each.name: torch.empty(hidden[..., 1:, 0].shape, device=hidden.device) for each in fitness}
        at_once = rows_at_once(self.anatomy.head, windows.shape[1] - 1)
        for place, window in enumerate(tokens):
            for start in range(0, len(hidden), at_once):
                states = hidden[start : start + at_once, place, :-1]
                outputs = Outputs(
                    self.anatomy.head, states.flatten(0, 1), window[1:].repeat(len(states)), compiled=self._compiled
                )
                for each in fitness:
                    wanted = {name: _repeated(part, len(states)) for name, part in targets[place][each.name].items()}
                    found = each.losses(outputs, wanted).view(len(states), -1)
                    losses[each.name][start : start + len(states), place] = found
        return {name: values.cpu().numpy()[rows] for name, values in losses.items()}

    def _hidden(self, genomes: Genomes | None, tokens: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Run the population.

        Returns:
            Final hidden states (distinct genomes, windows, seq_len, hidden), and each genome's row in them.
        """
        anatomy = self.anatomy
        states = anatomy.embed(tokens)[None]
        rows = np.zeros(1 if genomes is None else len(genomes), dtype=np.int64)
        for block, units in enumerate(self._blocks):
            if genomes is not None and block + 1 < len(self._blocks):
                self.levels.prefetch(_wanted(self._blocks[block + 1], genomes))
            if genomes is None:
                states = anatomy.run_block(block, states.flatten(0, 1)).unflatten(0, states.shape[:2])
                continue
            keys = np.concatenate([rows[:, None], genomes[:, units.places]], axis=1)
            first, rows = distinct_rows(keys)
            distinct = keys[first]
            if len(distinct) != len(states) or (distinct[:, 0] != np.arange(len(states))).any():
                states = states[moved(distinct[:, 0], states.device)]
            states = self._run_block(block, states, dict(zip(units.places.tolist(), distinct[:, 1:].T, strict=True)))
        final = anatomy.finish(tokens.repeat(len(states), 1), states.flatten(0, 1))
        return final.unflatten(0, states.shape[:2]), rows

    def _run_block(self, block: int, states: torch.Tensor, levels: Mapping[int, npt.NDArray[np.int64]]) -> torch.Tensor:
        """Run one block on states (rows, windows, seq_len, hidden), each row at its own levels (by unit's place)."""
        units = self._blocks[block]
        there = np.ones(len(states), dtype=bool)
        for place in units.whole:
            there &= levels[place] > 0
        if not there.any():
            return states
        rows = None if there.all() else moved(np.flatnonzero(there), states.device)
        given = states if rows is None else states[rows]
        with ExitStack() as routes:
            if units.sites:
                wanted = np.stack([levels[place][there] for place in units.sites.values()])
                for (site, place), groups in zip(units.sites.items(), groups_of(wanted, states.device), strict=True):
                    weights = {level: self.levels.weight((place, level)) for level in groups.levels}
                    routes.enter_context(replaced_forward(site.module, routed(site.module, groups, weights)))
            for site, place in units.writers.items():
                gone = np.flatnonzero(levels[place][there] == 0)
                if len(gone):
                    routes.enter_context(replaced_forward(site.module, silent_rows(site.module, gone, len(given))))
            done = self.anatomy.run_block(block, given.flatten(0, 1)).unflatten(0, given.shape[:2])
        return done if rows is None else states.index_copy(0, rows, done)

    def _dense(
        self, split: str, window: int, fitness: Sequence[Fitness], length: int, *, losses: bool
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return what each fitness remembers of the dense model on one window's first tokens, and its ``loss`` there.

        The dense model runs at most once, and not at all where everything is remembered.
        """

        @functools.cache
        def outputs() -> Outputs:
            tokens = moved(self.splits[split].windows[window][None], self.anatomy.device)
            hidden, _ = self._hidden(None, tokens)
            return Outputs(self.anatomy.head, hidden[0, 0, :-1], tokens[0, 1:], compiled=self._compiled)

        found = {}
        for each in fitness:
            targets = self._targets.get((each.name, split, window), functools.partial(_remember, each, outputs))
            kept = {**targets, "loss": each.losses(outputs(), targets)} if losses else targets
            found[each.name] = {name: part[: length - 1] for name, part in kept.items()}  # a causal model's prefix
        return found

    def _parts(self, rows: int, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """Cut (genomes, windows) into parts whose activations fit, whole populations first."""
        at_once = max(1, self._tokens_at_once // shape[1])
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


def _wanted(units: _Units, genomes: Genomes) -> list[tuple[int, int]]:
    """Return (place, level) of the layers' levels that a population has in a block."""
    return [(place, level) for place in units.sites.values() for level in levels_in(genomes[:, place])[0]]


def _repeated(part: torch.Tensor, times: int) -> torch.Tensor:
    return part if times == 1 else part.repeat(times, *(1 for _ in part.shape[1:]))


def _remember(fitness: Fitness, dense: Callable[[], Outputs]) -> dict[str, torch.Tensor]:
    return fitness.targets(dense())
