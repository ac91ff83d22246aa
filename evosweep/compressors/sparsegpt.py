"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774) for several sparsities and several layers at once."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.compensate import (
    ColumnRules,
    Factor,
    factorize,
    spans_of,
    stack_transposed,
    sums_by_matrix,
    sweep,
)
from evosweep.compressors.payload import Payload
from evosweep.compressors.sparse import SparseLevels, SparseSpec, keep_largest, keep_pattern, payload_of
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
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

    needs = frozenset({SECOND_MOMENT})

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
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping.
        """
        jobs = [(name, level) for name in weights for level in plans[name]]
        pruned = prune(
            [weights[name] for name, _ in jobs],
            statistics.second_moment,
            specs=[level.spec for _, level in jobs],
            damping=self.damping,
            mask_block=self.mask_block,
            column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), (weight, mask, error) in zip(jobs, pruned, strict=True):
            result[name][level.name] = payload_of(weight, mask, error=error)
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        blocks = {"mask_block": self.mask_block, "column_block": self.column_block}
        return {**super().describe(), "damping": self.damping, **blocks}


def prune(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    *,
    specs: Sequence[SparseSpec],
    damping: float,
    mask_block: int,
    column_block: int,
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Return matrices that share an input, each pruned to exactly as many weights as its spec says.

    Args:
        weights: Each (rows, columns) with the same columns; not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        specs: Weights kept in each matrix, and in which N:M pattern.
        damping: Share of the mean diagonal added to the diagonal.
        mask_block: Columns whose mask is chosen at once.
        column_block: Columns whose effect on later columns is applied at once.

    Returns:
        Of each matrix: pruned weight and mask (True where kept), both (rows, columns), and its error under ``gram``.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    work = stack_transposed(weights, gram)
    factor = factorize(gram, damping=damping)
    sizes = [len(weight) for weight in weights]
    masks = Masks(work, factor, sizes=sizes, specs=specs, block=mask_block)

    def rules(columns: slice) -> ColumnRules:
        return ColumnRules(mask=masks.choose(columns))

    total = sweep(work, factor, spans=spans_of(len(work), edges=masks.edges, block=column_block), rules=rules)
    kept = zip(work.split(sizes, 1), masks.mask.split(sizes, 1), sums_by_matrix(total, sizes), strict=True)
    return [(weight.T, mask.T, error) for weight, mask, error in kept]


class Masks:
    """The masks of a sweep, chosen block by block from the compensated weights.

    Args:
        work: Weights transposed, which the sweep changes, shape (columns, rows of all matrices).
        factor: Of their second moment.
        sizes: Rows of each matrix.
        specs: Weights kept in each matrix, and in which N:M pattern.
        block: Columns whose mask is chosen at once, where there is no pattern; with one, M columns are.

    Attributes:
        mask: True where a weight is kept, shape as ``work``.
        edges: No span of columns may cross a multiple of it.
    """

    def __init__(
        self,
        work: torch.Tensor,
        factor: Factor,
        *,
        sizes: Sequence[int],
        specs: Sequence[SparseSpec],
        block: int,
    ) -> None:
        self.work = work
        self.sizes = sizes
        self.specs = specs
        self.block = block
        self.pivots = factor.upper.diagonal()[:, None]
        self.mask = torch.zeros(work.shape, dtype=torch.bool, device=work.device)
        lengths = [spec.pattern[1] for spec in specs if spec.pattern]
        self.edges = math.gcd(block, *lengths)
        self.longest = max([block, *lengths])  # columns whose scores are looked at from where a span starts

    def choose(self, columns: slice) -> torch.Tensor:
        """Return the mask of a span, shape (columns, rows); a block that begins with the span is chosen now."""
        start = columns.start
        width = len(self.work)
        ahead = slice(start, start + self.longest)
        scores = (self.work[ahead] / self.pivots[ahead]).square()  # w² / [H⁻¹]_jj
        matrices = zip(self.mask[start:].split(self.sizes, 1), scores.split(self.sizes, 1), self.specs, strict=True)
        for mask, score, spec in matrices:
            if spec.pattern and start % spec.pattern[1] == 0:
                length = spec.pattern[1]
                # Transposed, since a pattern runs along the rows of the weight.
                mask[:length] = keep_pattern(score[:length].T, spec.pattern).T
            elif not spec.pattern and start % self.block == 0:
                stop = min(start + self.block, width)
                # Each block keeps its share, rounded so that the whole comes out exactly.
                quota = spec.kept * stop // width - spec.kept * start // width
                mask[: stop - start] = keep_largest(score[: stop - start], quota)
        return self.mask[columns]

    def may_stay(self, columns: slice) -> torch.Tensor:
        """Return which weights may still be kept, shape (columns, rows): chosen ones, and all under a pattern.

        A pattern's mask is chosen M columns at a time, later than the grid of the group that these columns are in.
        """
        return self.mask[columns] | self._has_pattern

    @cached_property
    def _has_pattern(self) -> torch.Tensor:
        """Whether each row's mask follows a pattern, shape (rows,)."""
        patterned = torch.tensor([spec.pattern is not None for spec in self.specs])
        return patterned.repeat_interleave(torch.tensor(self.sizes)).to(self.mask.device)
