"""The units outside of the blocks while a store is built: the embedding before the first block, the head at the end."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from evosweep import parallel
from evosweep.compressors.base import Compressor
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import INPUT_SQUARE, SECOND_MOMENT
from evosweep.models.slots import OuterSlot, Slot
from evosweep.store.manifest_rows import ManifestUnit
from evosweep.store.outliers import outlier_ratios
from evosweep.store.passage import Passage
from evosweep.store.payload_files import stored_once
from evosweep.store.statistics.base import InputBatch, mean_over_tokens, statistic_module
from evosweep.store.store_plan import StorePlan
from evosweep.store.unfinished import UnfinishedStore
from evosweep.store.weighting import WEIGHTINGS


class Maker(Protocol):
    """What the walk through the blocks offers: ``calibrate.Walk``."""

    plan: StorePlan
    settings: Any

    def compress(
        self, members: Sequence[Slot], dense: Any, measured: Mapping[str, Any], compressor: Compressor | None = None
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of slots that share an input.

        Args:
            members: The slots.
            dense: Their fp32 weights by name.
            measured: Statistics of their input.
            compressor: Makes the levels; None is the plan's.
        """
        ...

    def row(
        self,
        slot: Slot,
        weight: torch.Tensor,
        payloads: Mapping[str, Payload],
        measured: Mapping[str, Any],
        ratios: Mapping[str, float],
        file: str | None = None,
    ) -> ManifestUnit:
        """Return a slot's row of the manifest.

        Args:
            slot: The slot.
            weight: Its dense fp32 weight.
            payloads: Its levels.
            measured: Statistics of its input.
            ratios: Its shares of outlier weights.
            file: Name of its file.
        """
        ...

    def passed_on(self, slot: Slot, payloads: Mapping[str, Payload]) -> torch.Tensor: ...


@dataclass
class OuterWalk:
    """Makes the levels of embedding and head.

    Attributes:
        walk: The walk through the blocks.
        passage: The calibration text on its way.
        unfinished: Where the leader writes a file for each.
        made: Payloads of the embedding, if made before the blocks.
    """

    walk: Maker
    passage: Passage
    unfinished: UnfinishedStore
    made: dict[str, dict[str, Payload]] = field(default_factory=dict)

    def begin(self) -> None:
        """Send the text to the first block, through the embedding's nominal level where levels need no statistics."""
        anatomy = self.walk.plan.anatomy
        slot = self._slots.get("embedding")
        if slot is None or self._compressor(slot).needs:
            self.passage.begin(nullcontext())
            return
        dense = {slot.name: slot.read().float()}
        self.made = self.walk.compress([slot], dense, {}, self._compressor(slot))
        weight = self.walk.passed_on(slot, self.made[slot.name]).to(anatomy.dtype)
        self.passage.begin(slot.with_weight(weight))

    def finished(self) -> list[ManifestUnit]:
        """Return the rows of the units outside of the blocks, and write their payloads."""
        return [self._finish(role, slot) for role, slot in self._slots.items()]

    def _finish(self, role: str, slot: OuterSlot) -> ManifestUnit:
        dense = {slot.name: slot.read().float()}
        looked_up = role == "embedding" and not slot.tied
        measured = {} if looked_up else self._measured(self._compressor(slot).needs)
        payloads = (
            self.made.get(slot.name) or self.walk.compress([slot], dense, measured, self._compressor(slot))[slot.name]
        )
        square = measured.get(INPUT_SQUARE, torch.ones(slot.shape[1], device=slot.read().device))
        ratios = outlier_ratios({slot.name: (slot.read, square)})[slot.name]
        file = f"{role}.safetensors"
        if looked_up and self.walk.settings.layer_errors:
            # Each token's error counts as often as the token occurs: the rows, scaled, against the identity.
            scale = self._frequencies(slot.shape[0]).sqrt()[:, None]
            row = self.walk.row(slot, dense[slot.name], payloads, {}, ratios, file=file).with_errors(
                {
                    name: float((scale * (dense[slot.name] - made.weight)).square().sum(dtype=torch.float64))
                    for name, made in payloads.items()
                },
                whole=float((scale * dense[slot.name]).square().sum(dtype=torch.float64)),
            )
        else:
            row = self.walk.row(slot, dense[slot.name], payloads, measured, ratios, file=file)
        if parallel.is_leader():
            self.unfinished.add(stored_once(row, payloads), file)
        return row

    def _measured(self, needs: frozenset[str]) -> Mapping[str, Any]:
        """Return the statistics of the head's input."""
        anatomy = self.walk.plan.anatomy
        errors = {SECOND_MOMENT} if self.walk.settings.layer_errors else set()
        names = sorted({INPUT_SQUARE} | errors | needs)
        size = {"columns": anatomy.head.weight.shape[1], "device": anatomy.device}
        found = {name: statistic_module(name).Measurement(**size) for name in names}
        for index, tokens in enumerate(self.passage.tokens):
            batch = InputBatch(self.passage.final(index), WEIGHTINGS[self.walk.settings.token_weighting], len(tokens))
            for measurement in found.values():
                measurement.add(batch)
        return {name: measurement.finish() for name, measurement in found.items()}

    def _frequencies(self, vocabulary: int) -> torch.Tensor:
        """Return each token's share of the calibration text, shape (vocabulary,)."""
        ids = torch.cat([batch.flatten() for batch in self.passage.tokens])
        return mean_over_tokens(torch.bincount(ids, minlength=vocabulary).float(), len(ids))

    def _compressor(self, slot: OuterSlot) -> Compressor:
        return self.walk.plan.outer.compressors(self.walk.plan.anatomy)[slot.name]

    @property
    def _slots(self) -> dict[str, OuterSlot]:
        plan = self.walk.plan
        outer = plan.anatomy.outer if plan.outer.any else {}
        return {role: slot for role, slot in outer.items() if slot.name in plan.levels}
