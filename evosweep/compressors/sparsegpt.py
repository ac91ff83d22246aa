"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774) for several sparsities and several layers at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from evosweep.compressors.base import LevelPlan, Payload, Plans
from evosweep.compressors.compensate import Factor, Rules, factorize, spans_of, sums, sweep, transposed
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
        column_block: int = 64,
    ) -> None:
        super().__init__(sparsity=sparsity, window=window, step=step, patterns=patterns)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.mask_block = check_int("mask_block", mask_block, low=1)
        self.column_block = check_int("column_block", column_block, low=1)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        jobs = [(name, plan) for name in weights for plan in plans[name]]
        pruned = prune(
            [weights[name] for name, _ in jobs],
            gram,
            plans=[plan for _, plan in jobs],
            damping=self.damping,
            mask_block=self.mask_block,
            column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, plan), (weight, mask, error) in zip(jobs, pruned, strict=True):
            result[name][plan.name] = payload_of(weight, mask, error=error)
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
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Prune matrices that share an input, each to exactly as many weights as its plan keeps.

    Args:
        weights: Each (rows, columns) with the same columns; not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        plans: Weights left in each matrix, and whether in an N:M pattern.
        damping: Share of the mean diagonal added to the diagonal.
        mask_block: Columns whose mask is chosen at once.
        column_block: Columns whose effect on later columns is applied at once.

    Returns:
        Of each matrix: pruned weight and mask (True where kept), both (rows, columns), and its error under ``gram``.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    left, factor = transposed(weights, gram), factorize(gram, damping=damping)
    sizes = [len(weight) for weight in weights]
    masks = Masks(left, factor, sizes=sizes, plans=plans, block=mask_block)

    def rules(columns: slice) -> Rules:
        return Rules(mask=masks.at(columns))

    total = sweep(left, factor, spans=spans_of(len(left), edges=masks.edges, block=column_block), rules=rules)
    kept = zip(left.split(sizes, 1), masks.mask.split(sizes, 1), sums(total, sizes), strict=True)
    return [(weight.T, mask.T, error) for weight, mask, error in kept]


class Masks:
    """Which weights stay, chosen block by block, from what compensation has made of them by then.

    Args:
        left: Weights transposed, as a sweep changes them, shape (columns, rows of all matrices).
        factor: Of their second moment.
        sizes: Rows of each matrix.
        plans: Weights left in each matrix, and whether in an N:M pattern.
        block: Columns whose mask is chosen at once; a pattern's at M.

    Attributes:
        mask: True where a weight stays, shape as ``left``.
        edges: No span may cross a multiple of it.
    """

    def __init__(
        self,
        left: torch.Tensor,
        factor: Factor,
        *,
        sizes: Sequence[int],
        plans: Sequence[LevelPlan],
        block: int,
    ) -> None:
        self.left, self.sizes, self.plans, self.block = left, sizes, plans, block
        self.pivots = factor.upper.diagonal()[:, None]
        self.mask = torch.zeros(left.shape, dtype=torch.bool, device=left.device)
        self.edges = math.gcd(block, *(plan.group for plan in plans if plan.group))

    def at(self, columns: slice) -> torch.Tensor:
        """Return the mask of a span, chosen now where a block begins with it, shape (columns, rows)."""
        start, width = columns.start, len(self.left)
        scores = (self.left[start : start + self.block] / self.pivots[start : start + self.block]).square()
        split = zip(self.mask[start:].split(self.sizes, 1), scores.split(self.sizes, 1), self.plans, strict=True)
        for part, scored, plan in split:
            stop = min(start + (plan.group or self.block), width)
            if plan.group and not start % plan.group:
                # Transposed here: a group goes down the columns of the weight.
                one = replace(plan, kept=plan.kept * plan.group // width)
                part[: stop - start] = keep_in_groups(scored[: stop - start].T, one).T
            elif not plan.group and not start % self.block:
                # Each block takes its share, rounded so that the whole comes out exactly.
                quota = plan.kept * stop // width - plan.kept * start // width
                part[: stop - start] = keep_largest(scored, quota)
        return self.mask[columns]

    def perhaps(self, columns: slice) -> torch.Tensor:
        """Return what of some columns may yet stay, shape (columns, rows): what is not chosen yet, as in patterns."""
        return self.mask[columns] | self._patterned

    @cached_property
    def _patterned(self) -> torch.Tensor:
        patterned = torch.tensor([bool(plan.group) for plan in self.plans])
        return patterned.repeat_interleave(torch.tensor(self.sizes)).to(self.mask.device)
