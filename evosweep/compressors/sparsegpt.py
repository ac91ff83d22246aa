"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774) for several sparsities and several layers at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from evosweep.compressors.base import LevelPlan, Payload, Plans
from evosweep.compressors.compensate import (
    Replayed,
    Settle,
    inverse_factor,
    settle_columns,
    spans_of,
    sweep,
)
from evosweep.compressors.sparse import SparseLevels, keep_in_groups, keep_largest, payload_of
from evosweep.core.checks import check_int, check_number


class SparseGPT(SparseLevels):
    """Removes weights by w² / [H⁻¹]_jj and moves their error onto the columns that follow.

    Args:
        sparsity: Share of weights removed in the middle of the ladder.
        window: How far the ladder reaches to both sides, in sparsity.
        step: Weights a step; null takes a quarter of the smallest unit.
        patterns: N:M patterns that are the levels instead, such as ``2:4``.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        mask_block: Columns whose mask is chosen at once.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        window: float = 0.25,
        step: int | None = None,
        patterns: Sequence[str] | None = None,
        damping: float = 0.01,
        mask_block: int = 128,
        column_block: int = 32,
    ) -> None:
        super().__init__(sparsity=sparsity, window=window, step=step, patterns=patterns)
        self.damping = check_number("compressor.damping", damping, low=0, high=1, exclusive=True)
        self.mask_block = check_int("compressor.mask_block", mask_block, low=1)
        self.column_block = check_int("compressor.column_block", column_block, low=1)
        self._settle = Replayed(mask_span, changed=2)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        jobs = [(name, plan) for name in weights for plan in plans[name]]
        pruned, masks = prune(
            [weights[name].float() for name, _ in jobs], gram, plans=[plan for _, plan in jobs],
            damping=self.damping, mask_block=self.mask_block, column_block=self.column_block, settle=self._settle,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, plan), weight, mask in zip(jobs, pruned, masks, strict=True):
            result[name][plan.name] = payload_of(weight, mask)
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        blocks = {"mask_block": self.mask_block, "column_block": self.column_block}
        return {**super().describe(), "damping": self.damping, **blocks}


def prune(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    *,
    plans: Sequence[LevelPlan],
    damping: float,
    mask_block: int,
    column_block: int,
    settle: Settle | None = None,
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Prune matrices that share an input, each to exactly as many weights as its plan keeps.

    Args:
        weights: fp32, each (rows, columns) with the same columns; not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        plans: Weights left in each matrix, and whether in an N:M pattern.
        damping: Share of the mean diagonal added to the diagonal.
        mask_block: Columns whose mask is chosen at once.
        column_block: Columns whose effect on later columns is applied at once.
        settle: Stands in for ``mask_span``.

    Returns:
        Pruned weights and masks (True where kept), each (rows, columns).

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    left = torch.cat(list(weights)).T.contiguous().clone()
    upper = inverse_factor(gram, damping=damping)
    sizes = [len(weight) for weight in weights]
    mask = torch.zeros(left.shape, dtype=torch.bool, device=left.device)
    columns, step = len(left), settle or mask_span

    def begin(start: int) -> None:
        scores = (left[start : start + mask_block] / upper.diagonal()[start : start + mask_block, None]).square()
        for part, scored, plan in zip(mask[start:].split(sizes, 1), scores.split(sizes, 1), plans, strict=True):
            stop = min(start + (plan.group or mask_block), columns)
            if plan.group and not start % plan.group:
                # Transposed here: a group goes down the columns of the weight.
                one = replace(plan, kept=plan.kept * plan.group // columns)
                part[: stop - start] = keep_in_groups(scored[: stop - start].T, one).T
            elif not plan.group and not start % mask_block:
                # Each block takes its share, rounded so that the whole comes out exactly.
                quota = plan.kept * stop // columns - plan.kept * start // columns
                part[: stop - start] = keep_largest(scored, quota)

    def settle_span(columns: slice, part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> None:
        begin(columns.start)
        step(part, errors, factor, mask[columns])

    edges = math.gcd(mask_block, *(plan.group for plan in plans if plan.group))
    spans = spans_of(columns, edges=edges, block=column_block)
    sweep(left, upper, spans=spans, settle=settle_span)
    return left.T.split(sizes), mask.T.split(sizes)


def mask_span(part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor) -> None:
    """Remove what is not in the mask (columns, rows) from a span, in place."""
    settle_columns(part, errors, factor, lambda place, weights: torch.where(mask[place], weights, 0.0))
