"""Joint sparsity and quantization: SparseGPT's masks with GPTQ's rounding of what is kept, in one column loop.

Frantar and Alistarh (arXiv 2301.00774, section 3.5): both move errors the same way, so a column is masked and rounded
in one step, and the columns that follow make up for the two at once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evosweep.compressors.base import LevelPlan, Payload, Plans, check_divides
from evosweep.compressors.compensate import Rules, factorize, spans_of, sums, sweep, transposed
from evosweep.compressors.formats import sparse_int
from evosweep.compressors.grid import Grid, largest, stacked
from evosweep.compressors.integer import check_widths
from evosweep.compressors.sparse import parse_pattern
from evosweep.compressors.sparsegpt import Masks
from evosweep.core.checks import check_bool, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal


class SparseGPTQ:
    """Every sparsity at every width.

    Args:
        sparsity: Shares of weights removed, or N:M patterns; each above 0 and below 1.
        bits: Widths of the codes of what is kept, each from 2 to 8, rising.
        group: Columns that share scale and zero; a divisor of ``mask_block``.
        symmetric: Whether the zero is the middle code.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        mask_block: Columns whose mask is chosen at once; groups must fit into it.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        sparsity: Sequence[float | str] = (0.25, 0.5, 0.75),
        bits: Sequence[int] = (3, 4),
        group: int = 64,
        symmetric: bool = False,
        damping: float = 0.01,
        mask_block: int = 128,
        column_block: int = 64,
    ) -> None:
        if not isinstance(sparsity, Sequence) or isinstance(sparsity, str) or not sparsity:
            raise SettingError("sparsity", allowed="a list of shares or N:M patterns", got=sparsity)
        self.sparsity = [_share(f"sparsity[{place}]", each) for place, each in enumerate(sparsity)]
        self.bits = check_widths(bits)
        self.group = check_int("group", group, low=1)
        self.symmetric = check_bool("symmetric", symmetric)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.mask_block = check_int("mask_block", mask_block, low=1)
        self.column_block = check_int("column_block", column_block, low=1)
        if self.mask_block % self.group:
            raise SettingError(
                "group",
                allowed=f"a divisor of compressor.mask_block={self.mask_block}",
                got=self.group,
                hint="a group's grid is made for the weights that its mask keeps",
            )

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelPlan]]:
        """Return one level a sparsity and width, named ``50%@4bit``, its nominal number the true bits a weight.

        Raises:
            SettingError: The group size, or M of a pattern, does not divide some layer's input width.
        """
        check_divides("group", self.group, shapes, owner=self)
        for share in self.sparsity:
            if isinstance(share, str):
                check_divides("M of sparsity", parse_pattern("", share)[1], shapes, got=share, owner=self)
        return {name: self._ladder(*shape) for name, shape in shapes.items()}

    def _ladder(self, rows: int, columns: int) -> list[LevelPlan]:
        numel, ladder = rows * columns, []
        for share in self.sparsity:
            few, many = parse_pattern("", share) if isinstance(share, str) else (0, 0)
            kept = numel // many * few if isinstance(share, str) else round(numel * (1 - share))
            word = share if isinstance(share, str) else f"{100 * share:.6g}%"
            for width in self.bits:
                cost = sparse_int.bits(
                    rows=rows, columns=columns, kept=kept, width=width, group=self.group, symmetric=self.symmetric
                )
                plan = LevelPlan(
                    f"{word}@{width}bit",
                    cost,
                    nominal=Nominal("bits_per_weight", cost / numel),
                    kept=kept,
                    group=many,
                    width=width,
                )
                ladder.append(plan)
        return sorted(ladder, key=lambda plan: plan.cost)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        jobs = [(name, plan) for name in weights for plan in plans[name]]
        sizes = [len(weights[name]) for name, _ in jobs]
        left, factor = transposed([weights[name] for name, _ in jobs], gram), factorize(gram, damping=self.damping)
        masks = Masks(left, factor, sizes=sizes, plans=[plan for _, plan in jobs], block=self.mask_block)
        top = largest([plan.width for _, plan in jobs], sizes, gram.device)
        codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
        grids: list[Grid] = []

        def rules(columns: slice) -> Rules:
            mask = masks.at(columns)
            if columns.start % self.group == 0:
                members = slice(columns.start, columns.start + self.group)
                kept = torch.where(masks.perhaps(members), left[members], 0.0)
                grids.append(Grid.of(kept.T, top=top, symmetric=self.symmetric))
            return Rules(grids[-1], codes[columns], mask)

        spans = spans_of(len(left), edges=math.gcd(masks.edges, self.group), block=self.column_block)
        total = sweep(left, factor, spans=spans, rules=rules)
        scales, zeros = stacked(grids)
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        parts = zip(
            codes.split(sizes, 1),
            masks.mask.split(sizes, 1),
            scales.split(sizes),
            zeros.split(sizes),
            sums(total, sizes),
            strict=True,
        )
        for (name, plan), (code, mask, scale, zero, error) in zip(jobs, parts, strict=True):
            result[name][plan.name] = self._payload(plan, code.T, mask.T, scale, zero, error)
        return result

    def _payload(
        self,
        plan: LevelPlan,
        codes: torch.Tensor,
        mask: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        error: float,
    ) -> Payload:
        rows, columns = codes.shape
        parts = sparse_int.encode(
            codes=codes,
            mask=mask,
            scales=scales,
            zeros=None if self.symmetric else zeros.to(torch.uint8),
            width=plan.width,
        )
        meta = {
            "rows": rows,
            "columns": columns,
            "kept": plan.kept,
            "width": plan.width,
            "group": columns // scales.shape[1],
        }
        return Payload("sparse_int", parts, meta, error)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return dict(vars(self))


def _share(setting: str, value: object) -> float | str:
    if isinstance(value, str):
        parse_pattern(setting, value)
        return value
    share = check_number(setting, value, low=0, high=1, exclusive=True)
    if share == 1:
        raise SettingError(setting, allowed="above 0 and below 1, or N:M", got=value)
    return share
