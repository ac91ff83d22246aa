"""Measures the inputs of one block's layers while calibration text runs through it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import repeat
from typing import Any

import torch

from evosweep.core.errors import StoreError
from evosweep.models.anatomy import Anatomy
from evosweep.models.attention import attention_received
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.routing_types import Routed
from evosweep.parallel import all_reduce_sum
from evosweep.store.routed import ROUTED_SHARE, ROUTED_TOKENS
from evosweep.store.statistics.base import InputBatch, Measurement, statistic_module
from evosweep.store.weighting import Weighting

LESS_OF_ALL = 32  # an expert is shown so many times fewer tokens of all than its share of routed ones


class _LastInput(Exception):
    """Ends a block's forward pass: no later layer is measured."""


def measure_inputs(
    anatomy: Anatomy,
    block: int,
    hidden: Sequence[torch.Tensor] | None,
    *,
    needs: Collection[str],
    weighting: Weighting,
    tokens: Sequence[torch.Tensor] | None = None,
    among: Collection[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the statistics of each shared input of a block: group name -> statistic -> value.

    Args:
        anatomy: The model.
        block: Index of the block.
        hidden: The block's inputs on calibration text, in batches (windows, seq_len, hidden); None runs the whole
            model.
        needs: Names of the statistics; those that are measured on the whole model are left out here.
        weighting: How tokens are weighted.
        tokens: The token ids of every batch (windows, seq_len), which the whole model and some blocks need.
        among: Names of the groups that are measured; None: all.

    Raises:
        StoreError: An input is not finite, or its tokens cannot be weighted.
    """
    inputs = _Inputs(anatomy, block, needs, weighting, among)
    reads = weighting.importance is not None
    shapes = [batch.shape for batch in hidden or tokens or ()]
    batches = list(zip(shapes, hidden or repeat(None), tokens or repeat(None), strict=False))
    received = [attention_received(anatomy, block, batch, ids) if reads else None for _, batch, ids in batches]
    with inputs.hooked():
        for (shape, batch, ids), attention in zip(batches, received, strict=True):
            inputs.expect(shape, attention)
            with suppress(_LastInput):
                if batch is not None:
                    anatomy.run_block(block, batch, ids)
                elif ids is not None:
                    anatomy.run_whole(ids)
    shares = inputs.routed_shares()
    values: dict[str, dict[str, Any]] = {}
    for group in list(inputs.found):
        measurements = inputs.found.pop(group)  # sums are freed one by one: all of them and their means may not fit
        values[group] = {name: measurements.pop(name).finish() for name in list(measurements)} | shares.get(group, {})
    for group, statistics in values.items():
        _check_finite(group, statistics)
    return values


class _Inputs:
    """The measurements of every shared input of a block, filled by hooks on the first layer that is given it.

    An expert's matrix has an input of its own: the tokens that the router sends to it, and a few of all tokens.

    Arguments as for ``measure_inputs``.

    Attributes:
        found: Group name -> statistic -> its measurement.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        block: int,
        needs: Collection[str],
        weighting: Weighting,
        among: Collection[str] | None = None,
    ) -> None:
        modules = {name: statistic_module(name) for name in sorted(needs)}
        self.kinds = {name: module for name, module in modules.items() if hasattr(module, "Measurement")}
        leaders = [slot for slot in anatomy.slots_of(block) if slot.group == slot.name]
        self.leaders = [slot for slot in leaders if among is None or slot.name in among]
        self.weighting = weighting
        self.shape: tuple[int, int] = (0, 0)
        self.received: torch.Tensor | None = None
        self.found: dict[str, dict[str, Measurement]] = {}
        self.experts = [slot for slot in self.leaders if isinstance(slot, RoutedSlot)]
        self.routed = torch.zeros(len(self.experts) + 1, dtype=torch.int64, device=anatomy.device)  # and of all tokens
        for slot in self.experts:  # in every process, whether a token goes to it or not
            self.found[slot.group] = self._measurements(slot.shape[1], anatomy.device)

    def _measurements(self, columns: int, device: torch.device) -> dict[str, Measurement]:
        return {name: kind.Measurement(columns=columns, device=device) for name, kind in self.kinds.items()}

    def routed_shares(self) -> dict[str, dict[str, float]]:
        """Return by group how many tokens the router sent to each expert, and what share that is of all tokens."""
        all_reduce_sum(self.routed)
        counts = self.routed.tolist()
        return {
            slot.group: {ROUTED_TOKENS: count, ROUTED_SHARE: max(count, 1) / max(counts[-1], 1)}
            for slot, count in zip(self.experts, counts[:-1], strict=True)
        }

    def expect(self, shape: Sequence[int], received: torch.Tensor | None) -> None:
        """Prepare for a batch.

        Args:
            shape: Of its hidden states, (windows, seq_len, hidden).
            received: Attention that its tokens receive, where the weighting reads it.
        """
        self.shape = (shape[0], shape[1])
        if self.experts:
            self.routed[-1] += shape[0] * shape[1]
        self.received = received

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Count what the layers are given for a while."""
        with ExitStack() as stack:
            for slot in self.leaders:
                if not isinstance(slot, RoutedSlot):
                    stack.callback(slot.module.register_forward_pre_hook(partial(self._count, slot.group)).remove)
            mixtures: dict[Routed, dict[tuple[str, int], int]] = {}
            for index, slot in enumerate(self.experts):
                mixtures.setdefault(slot.mixture, {})[slot.attribute, slot.expert] = index
            for mixture, indices in mixtures.items():
                every = max(1, round(LESS_OF_ALL / self.experts[next(iter(indices.values()))].share))
                stack.enter_context(mixture.watched(partial(self._count_expert, indices), every=every))
                last = self.leaders[-1]
                if isinstance(last, RoutedSlot) and last.mixture == mixture:
                    stack.callback(mixture.module.register_forward_hook(_end).remove)
            yield

    def _count_expert(
        self,
        indices: Mapping[tuple[str, int], int],
        attribute: str,
        expert: int,
        inputs: torch.Tensor,
        *,
        routed: bool,
    ) -> None:
        """Count what an expert's matrix is given; arguments as for ``mixture.Seen``.

        Args:
            indices: Position of each matrix in ``experts``.
        """
        index = indices.get((attribute, expert))
        if index is None:
            return  # it is measured in another pass
        if self.weighting.by_window:
            raise StoreError(
                f"{self.experts[index].group} is given some of the tokens only; store.token_weighting must be relative "
                "or plain"
            )
        if routed:
            self.routed[index] += len(inputs)
        for measurement in self.found[self.experts[index].group].values():
            measurement.add(InputBatch(inputs, self.weighting))

    def _count(self, group: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        if group not in self.found:
            self.found[group] = self._measurements(args[0].shape[-1], args[0].device)
        windows, tokens = self.shape
        if self.weighting.by_window and args[0].numel() != windows * tokens * args[0].shape[-1]:
            raise StoreError(
                f"{group} is given some of the tokens only; store.token_weighting must be relative or plain"
            )
        batch = InputBatch(args[0], self.weighting, windows if self.weighting.by_window else 1, self.received)
        for measurement in self.found[group].values():
            measurement.add(batch)
        if group == self.leaders[-1].name:
            raise _LastInput


def _end(module: torch.nn.Module, args: Any, output: Any) -> None:
    del module, args, output
    raise _LastInput


def _check_finite(group: str, statistics: dict[str, Any]) -> None:
    for value in statistics.values():
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
            raise StoreError(
                f"the calibration inputs of {group} hold NaN or Inf (or are too large to be squared); a model.dtype "
                "with more range may help, such as bfloat16 or float32"
            )
