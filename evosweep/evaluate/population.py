"""Score a whole population of genomes at once: candidates are a batch axis through the model's own blocks.

Candidates that agree on every level of the blocks so far share one row of activations; inside a linear layer, rows
are grouped by level. So each (unit, level) weight is used at most once a block for the whole population.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from evosweep.core.errors import EvosweepError, ModelError
from evosweep.core.lru import ByteLRU
from evosweep.core.problem import Genome, Problem
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.level_weights import LevelWeights, bytes_of
from evosweep.evaluate.memory import Resources, per_token, plan_memory
from evosweep.evaluate.routing import distinct_rows, groups_of, levels_in
from evosweep.fitness.base import Fitness, Outputs, rows_at_once
from evosweep.models.activations import NONE, RoundedInputs
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import moved, tf32
from evosweep.models.dropping import DropEffect, silenced_rows
from evosweep.models.fused import compile_norms, fused_rotary
from evosweep.models.patch import replaced_parameters
from evosweep.models.slots import Slot
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
        majority: As for ``routing.groups_of``.

    Attributes:
        plan: How memory is divided.
        drops: What dropping does, by index of the unit.
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
        majority: float | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.store = store
        self.splits = splits
        self.resources = resources or Resources()
        self.majority = majority
        self.drops = store.drops
        self._blocks = _units_by_block(anatomy, store, self.drops)
        self._gates = Problem(units=store.units, budget=sum(unit.levels[-1].cost for unit in store.units))
        longest = max(split.seq_len for split in splits.values())
        self.plan = plan_memory(self.resources, anatomy, store.units, seq_len=longest)
        self._tokens_at_once = int(self.plan.activations / per_token(anatomy))
        logger.debug("%s; %d tokens at once", self.plan, self._tokens_at_once)
        self.levels = LevelWeights(store, device=anatomy.device, dtype=anatomy.dtype, plan=self.plan)
        self._targets: ByteLRU[dict[str, torch.Tensor]] = ByteLRU(
            limit=self.plan.targets, size=lambda tensors: sum(map(bytes_of, tensors.values()))
        )
        self._tuned: Mapping[str, torch.Tensor] = {}
        self.validated: dict[bytes | None, dict[str, float]] = {}
        self.validated_windows: dict[bytes | None, list[float]] = {}
        asked = self.resources.activations
        columns = {unit.name: unit.columns for unit in store.units if not unit.gates}
        self._inputs = None if asked == NONE else RoundedInputs.of(asked, columns, owner=self.resources)
        self._compiled = self.resources.compiles(anatomy.device)
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
            EvosweepError: One candidate on one window does not fit the device's memory.
        """
        chosen = self.splits[split].windows[np.asarray(windows, dtype=np.int64), :length]
        if genomes is not None and self._gates.gating.any():  # so that they share rows
            genomes = np.stack([np.where(self._gates.alive(genome), genome, 0) for genome in genomes])
        with torch.inference_mode(), tf32(allowed=self.resources.tf32), self._fused():
            dense = [
                self._dense(split, int(window), fitness, chosen.shape[1], losses=genomes is None) for window in windows
            ]
            if genomes is None:
                return {one.name: self._finite([found[one.name]["loss"] for found in dense]) for one in fitness}
            return self._in_chunks(genomes, chosen, fitness, dense)

    def logits(self, genome: Genome | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, vocabulary) of one genome for one row of token ids (1, tokens)."""
        with torch.inference_mode():
            hidden, _ = self._hidden(None if genome is None else genome[None], tokens.to(self.anatomy.device))
            return self.anatomy.head.logits(hidden[0].flatten(0, 1))

    @contextmanager
    def tuned(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Score compressed models with other values of some parameters, by name, while the context lasts.

        The dense model keeps its own. What ``validated`` holds of compressed models is without them.
        """
        before = self._tuned
        self._tuned = values
        try:
            yield
        finally:
            self._tuned = before

    def weight(self, unit: int, level: int) -> torch.Tensor:
        """Return the weight (out, in) of a level, both by index, on the model's device in its type."""
        return self.levels.weight((unit, level))

    def rounded_inputs(self, layers: Mapping[str, torch.nn.Module]) -> AbstractContextManager[None]:
        """Return a context in which layers are given what ``evaluate.activations`` says.

        Args:
            layers: The module of each unit, by the unit's name.
        """
        return nullcontext() if self._inputs is None else self._inputs.of_layers(layers)

    @contextmanager
    def exact_inputs(self) -> Iterator[None]:
        """Give layers their inputs as they are while the context lasts, whatever ``evaluate.activations`` says."""
        before = self._inputs
        self._inputs = None
        try:
            yield
        finally:
            self._inputs = before

    def _finite(self, losses: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Return the dense model's losses, shape (1, windows, tokens - 1)."""
        values = np.stack([loss.float().cpu().numpy() for loss in losses])[None]
        if not np.isfinite(values).all():
            raise ModelError(
                "the dense model's loss on this text is NaN or infinite in "
                f"{str(self.anatomy.dtype).removeprefix('torch.')}: choose another model.dtype (float32 has the widest "
                "range), or the checkpoint is damaged"
            )
        return values

    def _fused(self) -> AbstractContextManager[None]:
        return fused_rotary(self.anatomy.blocks) if self._compiled else nullcontext()

    def _in_chunks(
        self,
        genomes: Genomes,
        windows: npt.NDArray[np.int64],
        fitness: Sequence[Fitness],
        targets: Sequence[Mapping[str, Mapping[str, torch.Tensor]]],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the losses of a population, computed in as many chunks as memory asks for."""
        shape = (len(genomes), len(windows), windows.shape[1] - 1)
        losses = {one.name: np.empty(shape, dtype=np.float32) for one in fitness}
        todo = self._chunks(len(genomes), windows.shape)
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
        losses = {one.name: torch.empty(hidden[..., 1:, 0].shape, device=hidden.device) for one in fitness}
        at_once = rows_at_once(self.anatomy.head, windows.shape[1] - 1, compiled=self._compiled)
        for index, window in enumerate(tokens):
            for start in range(0, len(hidden), at_once):
                states = hidden[start : start + at_once, index, :-1]
                outputs = Outputs(
                    self.anatomy.head, states.flatten(0, 1), window[1:].repeat(len(states)), compiled=self._compiled
                )
                for one in fitness:
                    wanted = {name: _repeated(kept, len(states)) for name, kept in targets[index][one.name].items()}
                    found = one.losses(outputs, wanted).view(len(states), -1)
                    losses[one.name][start : start + len(states), index] = found
        return {name: values.cpu().numpy()[rows] for name, values in losses.items()}

    def _hidden(self, genomes: Genomes | None, tokens: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Return final hidden states (distinct genomes, windows, seq_len, hidden), and each genome's row in them.

        Args:
            genomes: Level indices (genomes, units); None runs the dense model.
            tokens: Token ids (windows, seq_len).
        """
        if genomes is not None and self._tuned:
            with replaced_parameters(self.anatomy.model, self._tuned):
                return self._through_blocks(genomes, tokens)
        return self._through_blocks(genomes, tokens)

    def _through_blocks(
        self, genomes: Genomes | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Return what ``_hidden`` does, with the model's parameters as they are; arguments as there."""
        anatomy = self.anatomy
        states = anatomy.embed(tokens)[None]
        rows = np.zeros(1 if genomes is None else len(genomes), dtype=np.int64)
        for block, units in enumerate(self._blocks):
            if genomes is not None and block + 1 < len(self._blocks):
                self.levels.prefetch(_wanted(self._blocks[block + 1], genomes))
            if genomes is None:
                states = anatomy.run_block(block, states.flatten(0, 1)).unflatten(0, states.shape[:2])
                continue
            keys = np.concatenate([rows[:, None], genomes[:, units.indices]], axis=1)
            first, rows = distinct_rows(keys)
            distinct = keys[first]
            if len(distinct) != len(states) or (distinct[:, 0] != np.arange(len(states))).any():
                states = states[moved(distinct[:, 0], states.device)]
            states = self._run_block(block, states, dict(zip(units.indices.tolist(), distinct[:, 1:].T, strict=True)))
        final = anatomy.finish(tokens.repeat(len(states), 1), states.flatten(0, 1))
        return final.unflatten(0, states.shape[:2]), rows

    def _run_block(self, block: int, states: torch.Tensor, levels: Mapping[int, npt.NDArray[np.int64]]) -> torch.Tensor:
        """Return a block's output for every row, each row at its own levels.

        Args:
            block: Index of the block.
            states: Hidden states (rows, windows, seq_len, hidden).
            levels: Level of each row, by index of the unit. Rows that drop the whole block keep their states.
        """
        units = self._blocks[block]
        runs = np.ones(len(states), dtype=bool)
        for index in units.whole:
            runs &= levels[index] > 0
        if not runs.any():
            return states
        rows = None if runs.all() else moved(np.flatnonzero(runs), states.device)
        given = states if rows is None else states[rows]
        with ExitStack() as replacements:
            if units.slots:
                replacements.enter_context(self.rounded_inputs({slot.name: slot.module for slot in units.slots}))
                wanted = np.stack([levels[index][runs] for index in units.slots.values()])
                groups_by_slot = groups_of(wanted, states.device, majority=self.majority)
                for (slot, index), groups in zip(units.slots.items(), groups_by_slot, strict=True):
                    weights = {level: self.levels.weight((index, level)) for level in groups.levels}
                    replacements.enter_context(slot.forward_by_row(groups, weights))
            for slot, index in units.writers.items():
                gone = np.flatnonzero(levels[index][runs] == 0)
                if len(gone):
                    replacements.enter_context(silenced_rows(slot.module, gone, len(given)))
            done = self.anatomy.run_block(block, given.flatten(0, 1)).unflatten(0, given.shape[:2])
        return done if rows is None else states.index_copy(0, rows, done)

    def _dense(
        self, split: str, window: int, fitness: Sequence[Fitness], length: int, *, losses: bool
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Return each fitness's targets on the first tokens of one window, and with ``losses`` the dense ``loss``.

        The dense model runs at most once, and not at all where all targets are kept from an earlier call.

        Args:
            split: Name of the token split.
            window: Index of the window.
            fitness: What to compute.
            length: Number of tokens.
            losses: Whether the dense model's own loss is wanted.
        """

        @functools.cache
        def outputs() -> Outputs:
            tokens = moved(self.splits[split].windows[window][None], self.anatomy.device)
            hidden, _ = self._hidden(None, tokens)
            return Outputs(self.anatomy.head, hidden[0, 0, :-1], tokens[0, 1:], compiled=self._compiled)

        found = {}
        for one in fitness:
            targets = self._targets.get((one.name, split, window), functools.partial(_targets, one, outputs))
            kept = {**targets, "loss": one.losses(outputs(), targets)} if losses else targets
            found[one.name] = {name: tensor[: length - 1] for name, tensor in kept.items()}  # a causal model's prefix
        return found

    def _chunks(self, rows: int, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """Return (genomes, windows) as chunks whose activations fit, whole populations first."""
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
    """The units that change one block, as indices into a genome.

    Attributes:
        slots: Index of the unit of each slot.
        writers: Index of the unit that drops a sub-block, by the slot whose output is missing then.
        whole: Indices of the units that drop the whole block.
    """

    slots: Mapping[Slot, int]
    writers: Mapping[Slot, int]
    whole: tuple[int, ...]

    @cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        return np.array([*self.slots.values(), *self.writers.values(), *self.whole], dtype=np.int64)


def _units_by_block(anatomy: Anatomy, store: LevelStore, drops: Mapping[int, DropEffect]) -> list[_Units]:
    indices = {unit.name: index for index, unit in enumerate(store.units)}
    found = []
    for block in range(len(anatomy.blocks)):
        here = {index: effect for index, effect in drops.items() if block in effect.blocks}
        found.append(
            _Units(
                slots={slot: indices[slot.name] for slot in anatomy.slots_of(block) if slot.name in indices},
                writers={
                    anatomy.slot(effect.writer): index for index, effect in here.items() if effect.writer is not None
                },
                whole=tuple(index for index, effect in here.items() if effect.whole),
            )
        )
    return found


def _wanted(units: _Units, genomes: Genomes) -> list[tuple[int, int]]:
    """Return (unit, level) of all levels that a population has in the slots of a block."""
    return [(index, level) for index in units.slots.values() for level in levels_in(genomes[:, index])[0]]


def _repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor if times == 1 else tensor.repeat(times, *(1 for _ in tensor.shape[1:]))


def _targets(fitness: Fitness, dense: Callable[[], Outputs]) -> dict[str, torch.Tensor]:
    return fitness.targets(dense())
