"""Score a whole population of genomes at once: candidates are a batch axis through the model's own blocks.

Candidates that agree on every level of the blocks so far share one row of activations; inside a linear layer, rows
are grouped by level. So each (unit, level) weight is used at most once a block for the whole population.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from evosweep import parallel
from evosweep.core.lru import ByteLRU
from evosweep.core.problem import Genome, Problem
from evosweep.core.ties import Expansion
from evosweep.core.unit import Unit
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.block_units import units_by_block, wanted_levels
from evosweep.evaluate.heads import Heads, Targets, finite, made_targets
from evosweep.evaluate.level_weights import LevelWeights, bytes_of
from evosweep.evaluate.memory import Resources, chunks, halves, per_token, plan_memory
from evosweep.evaluate.on_text import on_text
from evosweep.evaluate.outer import OuterUnits
from evosweep.evaluate.replaced import Replaced
from evosweep.evaluate.routing import distinct_rows
from evosweep.evaluate.shared import Sharing, Wanted
from evosweep.fitness.base import Fitness, Outputs
from evosweep.models.activations import NONE, RoundedInputs
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved, tf32
from evosweep.models.fused import compile_norms, fused_rotary
from evosweep.models.patch import replaced_parameters
from evosweep.store.manifest import LevelStore

Genomes = npt.NDArray[np.int64]
logger = logging.getLogger(__name__)


class Evaluator:
    """Computes the fitness of genomes from a model, its level store and token splits.

    Args:
        anatomy: The dense model; its weights are never changed.
        store: Levels of its units; genomes index them.
        splits: Token windows by split name.
        resources: What scoring may use.
        units: The store's units with tied ones as one; genomes may index these instead. None: nothing is tied.
        majority: As for ``routing.groups_of``.
        shared: Whether processes that follow this one have the same evaluator, and score with it.

    Attributes:
        plan: How memory is divided.
        drops: What dropping does, by index of the store's unit.
        expand: Turns genomes of tied units into genomes of the store's units, and leaves those as they are.
        validated: Figures of allocations on the whole validation split, by genome.
        validated_windows: Mean KL of every validation window, by genome.
    """

    def __init__(
        self,
        *,
        anatomy: Anatomy,
        store: LevelStore,
        splits: Mapping[str, TokenSplit],
        resources: Resources | None = None,
        units: Sequence[Unit] | None = None,
        majority: float | None = None,
        shared: bool = False,
    ) -> None:
        self.anatomy = anatomy
        self.store = store
        self.splits = splits
        self.resources = resources or Resources()
        self.majority = majority
        self.drops = store.drops
        self.expand = Expansion.of(units or store.units, store.units)
        self._blocks = units_by_block(anatomy, store, self.drops)
        self._outer = OuterUnits.of(anatomy, store.units)
        self._gates = Problem(units=store.units, budget=sum(unit.levels[-1].cost for unit in store.units))
        longest = max(split.seq_len for split in splits.values())
        self.plan = plan_memory(self.resources, anatomy, store.units, seq_len=longest)
        self._tokens_at_once = int(self.plan.activations / per_token(anatomy))
        logger.debug("%s; %d tokens at once", self.plan, self._tokens_at_once)
        self.levels = LevelWeights(store, device=anatomy.device, dtype=anatomy.dtype, plan=self.plan)
        self._targets: ByteLRU[dict[str, torch.Tensor]] = ByteLRU(
            limit=self.plan.targets, size=lambda tensors: sum(map(bytes_of, tensors.values()))
        )
        self.sharing = Sharing(self) if shared and parallel.leads() else None
        self.tuned_values: Mapping[str, torch.Tensor] = {}
        self.validated: dict[bytes | None, dict[str, float]] = {}
        self.validated_windows: dict[bytes | None, list[float]] = {}
        columns = {unit.name: unit.columns for unit in store.units if not unit.gates and not unit.outer}
        self.inputs = (
            None
            if self.resources.activations == NONE
            else RoundedInputs.of(self.resources.activations, columns, owner=self.resources)
        )
        self._compiled = self.resources.compiles(anatomy.device)
        self._heads = Heads(
            anatomy, self.levels, unit=self._outer.head, compiled=self._compiled, limit=self.plan.targets
        )
        if self._compiled:
            compile_norms(anatomy.blocks)

    def score(
        self, genomes: Genomes | None, *, split: str, windows: Sequence[int], fitness: Sequence[Fitness]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return each fitness of each genome, by name, shape (genomes,).

        Args:
            genomes: Level indices, shape (genomes, units); None scores the dense model, as one genome.
            split: Name of the token split.
            windows: Indices of its windows.
            fitness: What to compute; all share one pass over the head.
        """
        losses = self.token_losses(genomes, split=split, windows=windows, fitness=fitness)
        return {
            one.name: np.array([one.reduce(mean) for mean in losses[one.name].mean(axis=(1, 2), dtype=np.float64)])
            for one in fitness
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
            genomes: Level indices, shape (genomes, units); None scores the dense model, as one genome. Levels of units
                that a dropped unit gates make no difference.
            split: Name of the token split.
            windows: Indices of its windows.
            fitness: What to compute; all share one pass over the head.
            length: Only so many tokens of each window, from its start.

        Raises:
            ModelError: The dense model's loss is NaN or infinite.
            EvosweepError: One candidate on one window does not fit the device's memory, or another process failed.
        """
        wanted = Wanted(split, windows, fitness, length)
        return self.own_losses(genomes, wanted) if self.sharing is None else self.sharing.losses(genomes, wanted)

    def own_losses(self, genomes: Genomes | None, wanted: Wanted) -> dict[str, npt.NDArray[np.float32]]:
        """Return what ``token_losses`` does, computed by this process alone."""
        return on_text(wanted, self.splits[wanted.split], functools.partial(self._all_losses, genomes))

    def _all_losses(self, genomes: Genomes | None, wanted: Wanted) -> dict[str, npt.NDArray[np.float32]]:
        """Return the loss on every token, of an image's too; arguments as ``own_losses``."""
        split = wanted.split
        fitness = wanted.fitness
        windows = [int(window) for window in wanted.windows]
        chosen = self.splits[split].windows[windows, : wanted.length]
        genomes = None if genomes is None else self.expand(genomes)
        if genomes is not None and self._gates.gating.any():  # so that they share rows
            genomes = np.stack([np.where(self._gates.alive(genome), genome, 0) for genome in genomes])
        fused = fused_rotary(self.anatomy.blocks) if self._compiled else nullcontext()
        with torch.inference_mode(), tf32(allowed=self.resources.tf32), fused:
            if genomes is None:
                alone = [self._dense(split, window, fitness, chosen.shape[1], losses=True) for window in windows]
                return {one.name: finite([found[one.name]["loss"] for found in alone], self.anatomy) for one in fitness}
            dense = [self._targets_by_head(genomes, split, window, fitness, chosen.shape[1]) for window in windows]
            return self._in_chunks(genomes, chosen, fitness, dense)

    def logits(self, genome: Genome | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) of one genome for one row of token ids (1, tokens)."""
        genome = None if genome is None else self.expand(genome)
        with torch.inference_mode():
            hidden, _ = self._hidden(None if genome is None else genome[None], tokens.to(self.anatomy.device))
            level = None if genome is None else self._outer.head_level(genome)
            return self._heads.head(level).logits(hidden[0].flatten(0, 1))

    @contextmanager
    def tuned(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Score compressed models with other values of some parameters, by name, while the context lasts.

        The dense model keeps its own. What ``validated`` holds of compressed models is without them.
        """
        before = self.tuned_values
        self.tuned_values = values
        try:
            yield
        finally:
            self.tuned_values = before

    def weight(self, unit: int, level: int) -> torch.Tensor:
        """Return the weight (out, in) of a level, both by index in the store, on the model's device in its type."""
        return self.levels.weight((unit, level))

    def rounded_inputs(self, layers: Mapping[str, torch.nn.Module]) -> AbstractContextManager[None]:
        """Return a context in which layers, modules by their unit's name, get what ``evaluate.activations`` says."""
        return nullcontext() if self.inputs is None else self.inputs.of_layers(layers)

    @contextmanager
    def exact_inputs(self) -> Iterator[None]:
        """Give layers their inputs as they are while the context lasts, whatever ``evaluate.activations`` says."""
        before = self.inputs
        self.inputs = None
        try:
            yield
        finally:
            self.inputs = before

    def _in_chunks(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[int | None, Targets]],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the losses of a population, computed in as many chunks as memory asks for."""
        shape = (len(genomes), len(windows), windows.shape[1] - 1)
        losses = {one.name: np.empty(shape, dtype=np.float32) for one in fitness}
        todo = chunks(len(genomes), windows.shape, tokens_at_once=self._tokens_at_once)
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
        """Return a chunk that did not fit as two halves; later chunks are made smaller from the start."""
        parts = halves(rows, span, seq_len, error)
        torch.cuda.empty_cache()
        self._tokens_at_once = max(seq_len, self._tokens_at_once // 2)
        logger.warning("out of memory; from now on %d tokens at once", self._tokens_at_once)
        return parts

    def _losses(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[int | None, Targets]],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the losses of each genome on each token of some windows."""
        tokens = moved(windows, self.anatomy.device)
        hidden, rows = self._hidden(genomes, tokens)
        shape = (len(genomes), len(windows), windows.shape[1] - 1)
        losses = {one.name: np.empty(shape, dtype=np.float32) for one in fitness}
        for group in self._outer.by_head(genomes, rows):
            states = hidden if group.states is None else hidden[moved(group.states, hidden.device)]
            wanted = [window[group.level] for window in targets]
            for name, values in self._heads.losses(states, tokens, fitness, wanted, group.level).items():
                losses[name][group.members] = values.cpu().numpy()[group.rows]
        return losses

    def _embedded(self, genomes: Genomes | None, tokens: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Return the first block's input (distinct embedding levels, windows, seq_len, hidden), each genome's row."""
        unit = self._outer.embedding
        if genomes is None or unit is None:
            states = self.anatomy.embed(tokens)[None]
            return states, np.zeros(1 if genomes is None else len(genomes), dtype=np.int64)
        levels, rows = np.unique(genomes[:, unit], return_inverse=True)
        found = []
        for level in levels.tolist():
            with self.anatomy.outer["embedding"].with_weight(self.levels.weight((unit, level))):
                found.append(self.anatomy.embed(tokens))
        return torch.stack(found), rows.astype(np.int64)

    def _hidden(self, genomes: Genomes | None, tokens: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Return final hidden states (distinct genomes, windows, seq_len, hidden), and each genome's row in them.

        Args:
            genomes: Level indices (genomes, units); None runs the dense model.
            tokens: Token ids (windows, seq_len).
        """
        if genomes is not None and self.tuned_values:
            with replaced_parameters(self.anatomy.model, self.tuned_values):
                return self._through_blocks(genomes, tokens)
        return self._through_blocks(genomes, tokens)

    def _through_blocks(
        self, genomes: Genomes | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Return what ``_hidden`` does, with the model's parameters as they are; arguments as there."""
        anatomy = self.anatomy
        if anatomy.whole_because:
            if genomes is not None:
                return self._replaced.through_model(genomes, tokens)
            return anatomy.run_whole(tokens)[None], np.zeros(1, dtype=np.int64)
        states, rows = self._embedded(genomes, tokens)
        for block, units in enumerate(self._blocks):
            if genomes is not None and block + 1 < len(self._blocks):
                self.levels.prefetch(wanted_levels(self._blocks[block + 1], genomes))
            if genomes is None:
                states = anatomy.run_block(block, states.flatten(0, 1), tokens).unflatten(0, states.shape[:2])
                continue
            keys = np.concatenate([rows[:, None], genomes[:, units.indices]], axis=1)
            first, rows = distinct_rows(keys)
            distinct = keys[first]
            if len(distinct) != len(states) or (distinct[:, 0] != np.arange(len(states))).any():
                states = states[moved(distinct[:, 0], states.device)]
            levels = dict(zip(units.indices.tolist(), distinct[:, 1:].T, strict=True))
            states = self._run_block(block, states, levels, tokens)
        final = anatomy.finish(tokens.repeat(len(states), 1), states.flatten(0, 1))
        return final.unflatten(0, states.shape[:2]), rows

    @property
    def _replaced(self) -> Replaced:
        return Replaced(self.anatomy, self.levels, self._blocks, self._outer, self.rounded_inputs, self.majority)

    def _run_block(
        self, block: int, states: torch.Tensor, levels: Mapping[int, npt.NDArray[np.int64]], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return a block's output for every row, each row at its own levels.

        Args:
            block: Index of the block.
            states: Hidden states (rows, windows, seq_len, hidden).
            levels: Level of each row, by index of the unit. Rows that drop the whole block keep their states.
            tokens: Token ids (windows, seq_len).
        """
        units = self._blocks[block]
        runs = np.ones(len(states), dtype=bool)
        for index in units.whole:
            runs &= levels[index] > 0
        if not runs.any():
            return states
        rows = None if runs.all() else moved(np.flatnonzero(runs), states.device)
        given = states if rows is None else states[rows]
        with self._replaced.block(block, {index: level[runs] for index, level in levels.items()}, len(given)):
            done = self.anatomy.run_block(block, given.flatten(0, 1), tokens).unflatten(0, given.shape[:2])
        return done if rows is None else states.index_copy(0, rows, done)

    def _targets_by_head(
        self, genomes: Genomes, split: str, window: int, fitness: Sequence[Fitness], length: int
    ) -> dict[int | None, dict[str, dict[str, torch.Tensor]]]:
        """Return each fitness's targets on one window, by level of the head, for the levels that genomes have.

        Args:
            genomes: Level indices (genomes, units).
            split: Name of the token split.
            window: Index of the window.
            fitness: What to compute.
            length: Number of tokens.
        """
        dense = self._dense_outputs(split, window)
        return {
            level: self._dense(split, window, fitness, length, losses=False, level=level, outputs=dense)
            for level in self._outer.head_levels(genomes)
        }

    def _dense_outputs(self, split: str, window: int) -> Callable[[], Outputs]:
        """Return a function that runs the dense model on one window, at most once."""

        @functools.cache
        def outputs() -> Outputs:
            tokens = moved(self.splits[split].windows[window][None], self.anatomy.device)
            hidden, _ = self._hidden(None, tokens)
            labels = self.anatomy.pictures.plain(tokens)[0, 1:]
            return Outputs(self.anatomy.head, hidden[0, 0, :-1], labels, compiled=self._compiled)

        return outputs

    def _dense(
        self,
        split: str,
        window: int,
        fitness: Sequence[Fitness],
        length: int,
        *,
        losses: bool,
        level: int | None = None,
        outputs: Callable[[], Outputs] | None = None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return each fitness's targets on the first tokens of one window, and with ``losses`` the dense ``loss``.

        Args:
            split: Name of the token split.
            window: Index of the window.
            fitness: What to compute.
            length: Number of tokens.
            losses: Whether the dense model's own loss is wanted.
            level: The head's level that the targets are for; None is the dense head.
            outputs: Runs the dense model, where several levels share it.
        """
        run = outputs or self._dense_outputs(split, window)
        found = {}
        for one in fitness:
            make = functools.partial(made_targets, one, run, None if level is None else self._heads.head(level))
            targets = self._targets.get((one.name, split, window, level), make)
            kept = {**targets, "loss": one.losses(run(), targets)} if losses else targets
            found[one.name] = {name: tensor[: length - 1] for name, tensor in kept.items()}  # a causal model's prefix
        return found
