"""The walk through the model, block by block: measure the inputs of its layers, compress them, pass activations on."""

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import safe_open

from evosweep import parallel
from evosweep.compressors.base import Compressor, layer_error
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import INPUT_SQUARE, SECOND_MOMENT, Statistics
from evosweep.core.errors import StoreError
from evosweep.core.events import Progress
from evosweep.data.tokens import TokenSplit
from evosweep.models.activations import INPUT_RANGE
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import free_bytes
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.slots import Slot
from evosweep.store.calibrate_outer import OuterWalk
from evosweep.store.manifest import Stored
from evosweep.store.manifest_rows import ManifestLevel, ManifestUnit
from evosweep.store.measured import Measured
from evosweep.store.passage import Passage
from evosweep.store.payload_files import shared_tensors, stored_once
from evosweep.store.routed import ROUTED_SHARE, ROUTED_TOKENS
from evosweep.store.shared_compression import gathered, shared_out
from evosweep.store.statistics.base import statistic_module
from evosweep.store.store_plan import StorePlan, in_model_order, planned_unit
from evosweep.store.unfinished import UnfinishedStore
from evosweep.store.weighting import WEIGHTINGS

HIDDEN_SHARE = 0.4  # of free memory, as the next
BATCH_SHARE = 0.3
MOST_AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens; more makes nothing faster
ROOM_TO_GO_ON = 2  # a build goes on with batches of up to so many times what would fit the memory that is free now
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """How a store is calibrated; the arguments are those of ``StoreBuilder``."""

    propagate: float | None
    token_weighting: str
    layer_errors: bool
    batch_tokens: int | None
    input_ranges: bool = False


@dataclass
class Walk:
    """Builds the payloads of one level store, block by block.

    Attributes:
        plan: Units and levels.
        settings: How it is calibrated.
        progress: Shows how far it is.
        unfinished: What is there of the store already, and where its files are written.
        from_model: Statistics that were measured on the whole dense model, each by unit name.
    """

    plan: StorePlan
    settings: Calibration
    progress: Progress
    unfinished: UnfinishedStore
    from_model: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, calibration: TokenSplit) -> tuple[ManifestUnit, ...]:
        """Write the payloads of all units that are not there yet; return the units with what calibration measured.

        Args:
            calibration: Token windows.

        Raises:
            StoreError: An input is not finite, or a layer cannot be compressed.
        """
        anatomy = self.plan.anatomy
        tokens = torch.from_numpy(parallel.shard_rows(calibration.windows)).to(anatomy.device)
        memory = calibration_memory(anatomy, tokens.numel())
        if memory.home != anatomy.device:
            self.progress.say("calibration activations stay in host memory: the device has no room for them")
        batch_tokens = self._begin(memory.batch_tokens)
        self._measure_model(tokens, batch_tokens)
        windows_at_once = max(1, batch_tokens // calibration.seq_len)
        with Passage(anatomy, tokens.split(windows_at_once), memory.home) as passage:
            outer = OuterWalk(self, passage, self.unfinished)
            outer.begin()
            rows = self._blocks(passage)
            rows += outer.finished()
        return in_model_order(anatomy, rows)

    def _begin(self, batch_tokens: int) -> int:
        """Return how many tokens run at once: as asked for, as in the build that goes on, or as many as fit."""
        earlier = self.unfinished.batch_tokens
        fits = earlier is not None and earlier <= ROOM_TO_GO_ON * batch_tokens
        wanted = self.settings.batch_tokens or (earlier if fits else None) or batch_tokens
        least = torch.tensor([-wanted])
        parallel.all_reduce_max(least)
        if parallel.is_leader():
            self.unfinished.begin(-int(least))
        return -int(least)

    def _blocks(self, passage: Passage) -> list[ManifestUnit]:
        """Return the rows of all blocks; make those that are not there yet, and pass the text on."""
        done = self._finished()
        rows: list[ManifestUnit] = []
        with ThreadPoolExecutor(1) as writer:  # writes one block while the next is compressed
            pending = []
            for block in self.progress.track(range(len(done)), description="building level store"):
                if done[block]:
                    if self.plan.outer.any or not all(done[block:]):
                        self._pass_on_again(block, passage)
                    rows += self.unfinished.rows[block]
                    continue
                made = self._dropped(block, passage)
                layers, tensors = self._block(block, passage)
                made += layers
                rows += made
                if parallel.is_leader():
                    pending.append(writer.submit(self.unfinished.finish, block, made, tensors, file_of(block)))
                for written in pending[:-1]:
                    written.result()  # at most one block waits to be written; a full disk ends the walk here
            for written in pending:
                written.result()
        return rows

    def _finished(self) -> list[bool]:
        """Return which blocks an earlier build has finished, in every process."""
        done = torch.zeros(len(self.plan.anatomy.blocks), dtype=torch.int64)
        done[list(self.unfinished.rows)] = 1
        parallel.all_reduce_max(done)
        for block in done.nonzero().flatten().tolist():
            if block not in self.unfinished.rows:  # not the leader, which has verified it
                self.unfinished.read(block)
        return [bool(there) for there in done]

    def _dropped(self, block: int, passage: Passage) -> list[ManifestUnit]:
        """Return the units that are dropped from this block on."""
        options = [option for option in self.plan.dropped if option.blocks[0] == block]
        rows = self.plan.drop.rows(
            self.plan.anatomy,
            options,
            self.plan.levels,
            passage.hidden,
            tokens=passage.tokens,
            add_up=parallel.all_reduce_sum,
        )
        return [ManifestUnit.from_json(row) for row in rows]

    def _measure_model(self, tokens: torch.Tensor, batch_tokens: int) -> None:
        """Measure what the compressor needs of the whole dense model, or take what was kept of it.

        Several processes measure it again: only their leader is sure to have read what was kept.
        """
        alone = parallel.count() == 1
        kept = self.unfinished.statistics() if alone else {}
        for name in sorted(self.plan.needs):
            module = statistic_module(name)
            if hasattr(module, "measure_model"):
                prefix = f"{name}|"
                self.from_model[name] = {
                    key.removeprefix(prefix): value.to(self.plan.anatomy.device)
                    for key, value in kept.items()
                    if key.startswith(prefix)
                } or module.measure_model(self.plan.anatomy, tokens, batch_tokens=batch_tokens, progress=self.progress)
        found = {f"{name}|{unit}": value for name, values in self.from_model.items() for unit, value in values.items()}
        if alone and not kept and found and all(isinstance(value, torch.Tensor) for value in found.values()):
            self.unfinished.keep_statistics(found)

    def _block(self, block: int, passage: Passage) -> tuple[list[ManifestUnit], Tensors]:
        """Return units and payloads of one block; pass the text on through the compressed block."""
        anatomy = self.plan.anatomy
        rows: list[ManifestUnit] = []
        tensors: Tensors = {}
        passed_on: Tensors = {}
        slots = self._slots(block)
        weighting = WEIGHTINGS[self.settings.token_weighting]
        measured = Measured(anatomy, block, passage, needs=self._measured, weighting=weighting)
        ratios: dict[str, dict[str, float]] = {}
        for groups in measured.chunks(_by_group(slots)):
            ratios = ratios or measured.outlier_ratios(slots)
            for members in shared_out(groups, processes=parallel.count())[parallel.rank()]:
                dense = {slot.name: slot.read().to(anatomy.device).float() for slot in members}
                statistics = measured.of(members[0].group)
                payloads = self.compress(members, dense, statistics)
                for slot in members:
                    made = payloads[slot.name]
                    rows.append(self.row(slot, dense[slot.name], made, statistics, ratios[slot.name]))
                    tensors.update(stored_once(rows[-1], made))
                    passed_on[slot.name] = self.passed_on(slot, made)
        if parallel.count() > 1:
            rows, tensors, passed_on = gathered(slots, rows, tensors, passed_on)
        passage.pass_on(block, slots, passed_on)
        return rows, tensors

    def _pass_on_again(self, block: int, passage: Passage) -> None:
        """Pass the text on through a block that an earlier build has finished: the same bits as there."""
        weights = {}
        rows = {row.name: row for row in self.unfinished.rows[block]}
        for slot in self._slots(block):
            level = self._level_passed_on(slot, rows[slot.name].payloads)
            if level is None:
                weights[slot.name] = slot.read().clone()
                continue
            with safe_open(self.unfinished.payloads / file_of(block), framework="pt") as file:
                stored = Stored.of(rows[slot.name], level, file)
                tensors = {path: tensor.to(self.plan.anatomy.device) for path, tensor in stored.tensors().items()}
            weights[slot.name] = stored.assemble(tensors).weight
        passage.pass_on(block, self._slots(block), weights)

    def _slots(self, block: int) -> list[Slot]:
        """Return the compressed layers of a block."""
        return [slot for slot in self.plan.anatomy.slots_of(block) if slot.name in self.plan.levels]

    @property
    def _measured(self) -> frozenset[str]:
        """Everything that is measured of inputs: what the compressor and the manifest's columns need."""
        columns = {INPUT_SQUARE}
        if self.settings.layer_errors:
            columns.add(SECOND_MOMENT)
        if self.settings.input_ranges:
            columns.add(INPUT_RANGE)
        return self.plan.needs | columns

    def compress(
        self,
        members: Sequence[Slot],
        dense: Tensors,
        measured: Mapping[str, Any],
        compressor: Compressor | None = None,
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            members: The layers.
            dense: Their fp32 weights, among others.
            measured: Statistics of their input.
            compressor: Of a unit outside of the blocks; None is the plan's.
        """
        maker = compressor or self.plan.compressor
        own = {
            name: {slot.name: values[slot.name] for slot in members if slot.name in values}
            for name, values in self.from_model.items()
        }
        statistics = Statistics({**measured, **own}).only(self.plan.needs if compressor is None else compressor.needs)
        weights = {slot.name: dense[slot.name] for slot in members}
        plans = {slot.name: self.plan.levels[slot.name] for slot in members}
        try:
            return maker.compress(weights, statistics, plans)
        except StoreError as error:
            raise StoreError(f"{members[0].name}: {error}") from error

    def row(
        self,
        slot: Slot,
        weight: torch.Tensor,
        payloads: Mapping[str, Payload],
        measured: Mapping[str, Any],
        ratios: Mapping[str, float],
        file: str | None = None,
    ) -> ManifestUnit:
        """Return a compressed layer's row of the manifest.

        Args:
            slot: The layer.
            weight: Its dense fp32 weight.
            payloads: Its levels.
            measured: Statistics of its input.
            ratios: Its shares of outlier weights.
            file: Name of its file; None is that of its block.
        """
        moment = measured.get(SECOND_MOMENT)
        share = float(measured.get(ROUTED_SHARE, 1.0))  # errors are means over all tokens, and an expert gets some
        whole = 0.0 if moment is None else layer_error(weight, moment)
        levels = []
        for spec in self.plan.levels[slot.name]:
            if spec.name in payloads:
                payload = payloads[spec.name]
                error, relative = (
                    (payload.error, None)
                    if moment is None
                    else _errors(slot.name, payload, weight, moment=moment, whole=whole)
                )
                planned = ManifestLevel.planned(spec)
                error = None if error is None else share * error
                levels.append(replace(planned, error=error, relative_error=relative, payload=payload.layout()))
        row = planned_unit(slot, self.plan.levels[slot.name])
        shared = shared_tensors(slot.name, payloads)
        columns = {**row.columns, **ratios}
        columns |= {name: float(measured[name]) for name in (ROUTED_TOKENS, ROUTED_SHARE) if name in measured}
        if self.settings.input_ranges and INPUT_RANGE in measured:
            columns[INPUT_RANGE] = float(measured[INPUT_RANGE])
        name = file or file_of(slot.block)
        return replace(row, levels=tuple(levels), columns=columns, file=name, shared=shared)

    def passed_on(self, slot: Slot, payloads: Mapping[str, Payload]) -> torch.Tensor:
        """Return the weight through whose output later blocks are calibrated: the level nearest to ``propagate``.

        In the model's type: those of all layers of a block are kept until it is compressed.
        """
        level = self._level_passed_on(slot, payloads)
        return slot.read().clone() if level is None else payloads[level].weight.to(slot.read().dtype)

    def _level_passed_on(self, slot: Slot, made: Collection[str]) -> str | None:
        """Return the name of the level nearest to ``propagate``, of those that are made; None is the dense weight."""
        target = self.settings.propagate
        if target is None:
            return None
        levels = [spec for spec in self.plan.levels[slot.name] if spec.name in made]
        return min(levels, key=lambda spec: abs(spec.nominal.number - target)).name


@dataclass(frozen=True)
class CalibrationMemory:
    """Where calibration's hidden states are kept between blocks, and how many tokens run at once.

    Attributes:
        home: The device that keeps them: the model's, or the CPU where they do not fit.
        batch_tokens: Tokens of one forward pass of a block.
    """

    home: torch.device
    batch_tokens: int


def calibration_memory(anatomy: Anatomy, tokens: int) -> CalibrationMemory:
    """Return what fits the memory that is free now, for so many calibration tokens.

    Hidden states that would take more than ``HIDDEN_SHARE`` of it are kept in host memory. A batch takes, beside its
    hidden states, in every linear layer of the widest block inputs and outputs, and its inputs in fp32 for the second
    moment: no more than ``BATCH_SHARE``.
    """
    free = free_bytes(anatomy.device)
    item = anatomy.dtype.itemsize
    width = anatomy.head.weight.shape[1]
    wanted = tokens * width * item
    home = torch.device("cpu") if wanted > HIDDEN_SHARE * free else anatomy.device
    left = free if home != anatomy.device else free - wanted
    per_token = max(
        sum(_share(slot) * ((item + 4) * slot.shape[1] + item * slot.shape[0]) for slot in anatomy.slots_of(block))
        for block in range(len(anatomy.blocks))
    )
    fitting = max(1, int(BATCH_SHARE * left / per_token))
    return CalibrationMemory(home, min(fitting, MOST_AT_ONCE[anatomy.device.type]))


def _share(slot: Slot) -> float:
    """Return the share of the tokens that a slot's weight is multiplied with."""
    return slot.share if isinstance(slot, RoutedSlot) else 1.0


def file_of(block: int) -> str:
    """Return the name of the file with a block's payloads."""
    return f"block_{block:03d}.safetensors"


def _errors(
    name: str, payload: Payload, weight: torch.Tensor, *, moment: torch.Tensor, whole: float
) -> tuple[float, float]:
    """Return a level's output error, absolute and relative.

    Args:
        name: Of the layer, for messages.
        payload: The level.
        weight: The dense fp32 weight, shape (out, in).
        moment: Second moment of the layer's input.
        whole: Mean squared norm of the dense layer's output.

    Raises:
        StoreError: It is NaN or infinite.
    """
    error = payload.output_error(weight, moment)
    if not math.isfinite(error) or not math.isfinite(whole):
        raise StoreError(
            f"{name}: output error {error:g} of {whole:g}: its weights, or its inputs on the calibration text, are NaN "
            "or too large for float32; leave the layer out with units.exclude"
        )
    return error, error / whole if whole else 0.0


def _by_group(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Return layers that share an input together."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.group, []).append(slot)
    return list(groups.values())
