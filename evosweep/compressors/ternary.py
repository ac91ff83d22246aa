"""Ternary weights: −1, 0 and 1 times a scale, as BitNet b1.58 has them, made after training.

γ is the mean of |W| (BitNet b1.58, Ma et al., arXiv 2402.17764, equations 1 to 3), its median (BitNet b1.58 Reloaded,
Nielsen and Schneider-Kamp, arXiv 2407.09527) or the scale with the least squared error; a weight becomes
γ · clamp(round(W / γ), −1, 1). Error compensation is GPTQ's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans, check_divides
from evosweep.compressors.compensate import (
    ColumnRules,
    Factor,
    factorize,
    spans_of,
    stack_transposed,
    sums_by_matrix,
    sweep,
)
from evosweep.compressors.formats import base3
from evosweep.compressors.grid import Grid
from evosweep.compressors.groups import AUTO, group_of
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

BITS = 1.6
SCALES = ("mean", "median", "least_squares")
LLOYD_STEPS = 10
WHOLE = ("tensor", "row")
Group = int | str


@dataclass(frozen=True)
class TernarySpec:
    """A ternary level.

    Attributes:
        group: ``tensor``, ``row``, ``auto``, or columns that share a scale.
    """

    group: Group


class Ternary:
    """Rounding to −1, 0 and 1 times a scale, five weights a byte.

    Args:
        groups: What shares a scale, one level for each: ``tensor``, ``row``, a number of columns, or
            ``auto``, as in ``GPTQ``.
        scale: ``mean`` or ``median`` of |W|, or ``least_squares``.
        compensate: Whether a column's error is moved onto the columns that follow (GPTQ).
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        groups: Sequence[Group] = ("row", 64),
        scale: str = "least_squares",
        compensate: bool = True,
        damping: float = 0.01,
        column_block: int = 64,
    ) -> None:
        self.groups = check_groups(groups)
        self.scale = check_choice("scale", scale, SCALES)
        self.compensate = check_bool("compensate", compensate)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    @property
    def needs(self) -> frozenset[str]:
        """The second moment, if errors are compensated."""
        return frozenset({SECOND_MOMENT} if self.compensate else ())

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level for each of ``groups``, named ``ternary_row`` or ``ternary_64``, by rising cost.

        Raises:
            SettingError: A group does not divide some layer's input width.
        """
        for group in self.groups:
            if isinstance(group, int):
                check_divides("groups", group, shapes, owner=self, hint="auto gives each layer a size that fits it")
        return {name: sorted(self._levels(*shape), key=lambda level: level.cost) for name, shape in shapes.items()}

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        return [
            LevelSpec(
                name=f"ternary_{group}",
                cost=base3.bits(rows=rows, columns=columns, scales=scale_count(rows, columns, group)),
                nominal=Nominal("bits", BITS),
                spec=TernarySpec(group),
            )
            for group in self.groups
            if group != AUTO or group_of(AUTO, columns) not in self.groups
        ]

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment, if errors are compensated.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping.
        """
        moment = statistics.second_moment if self.compensate else None
        factor = None if moment is None else factorize(moment, damping=self.damping)
        made: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for group in self.groups:
            rounded = self._rounded(list(weights.values()), moment, factor, group)
            for (name, weight), (codes, scales, error) in zip(weights.items(), rounded, strict=True):
                meta = {"rows": weight.shape[0], "columns": weight.shape[1]}
                tensors = base3.encode(codes=codes, scales=scales)
                made[name][f"ternary_{group}"] = Payload(base3.__name__, tensors, meta, error=error)
        return {name: {level.name: made[name][level.name] for level in plans[name]} for name in weights}

    def _rounded(
        self, weights: Sequence[torch.Tensor], moment: torch.Tensor | None, factor: Factor | None, group: Group
    ) -> list[tuple[torch.Tensor, torch.Tensor, float | None]]:
        """Return codes (rows, columns), scales and output error of layers that share an input.

        Args:
            weights: Each (rows, columns).
            moment: Second moment of their input; None: errors are not compensated.
            factor: Its factor.
            group: What shares a scale.
        """
        columns = weights[0].shape[1]
        width = columns if group in WHOLE else group_of(group, columns)
        sizes = [len(weight) for weight in weights]
        of_tensor = [scale_of(weight.float().reshape(1, -1), self.scale) for weight in weights]
        work = stack_transposed(weights, torch.eye(columns, device=weights[0].device) if moment is None else moment)
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        scales: list[torch.Tensor] = []

        def rules(span: slice) -> ColumnRules:
            if span.start % width == 0:
                by_row = scale_of(work[span.start : span.start + width].T, self.scale)
                shared = torch.cat([one.expand(size) for one, size in zip(of_tensor, sizes, strict=True)])
                scales.append(shared if group == "tensor" else by_row)
            one = torch.ones_like(scales[-1])
            return ColumnRules(Grid(scales[-1], one, 2 * one), codes[span])

        spans = spans_of(columns, edges=width, block=self.column_block)
        errors: Sequence[float | None] = [None] * len(weights)
        if factor is None:
            for start, stop in spans:
                grid = rules(slice(start, stop)).grid
                codes[start:stop] = grid.codes(work[start:stop].T).T.to(torch.uint8)  # type: ignore[union-attr]
        else:
            errors = sums_by_matrix(sweep(work, factor, spans=spans, rules=rules), sizes)
        by_matrix = zip(codes.split(sizes, 1), torch.stack(scales, dim=1).split(sizes), errors, strict=True)
        return [(own.T, scale[:1] if group == "tensor" else scale, error) for own, scale, error in by_matrix]

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {
            "groups": self.groups,
            "scale": self.scale,
            "compensate": self.compensate,
            "damping": self.damping,
            "column_block": self.column_block,
        }


def check_groups(groups: object) -> list[Group]:
    """Return what the argument ``groups`` lists.

    Raises:
        SettingError: It is no list of ``tensor``, ``row``, ``auto`` and numbers of columns.
    """
    listed: list[Group] = list(groups) if isinstance(groups, Sequence) and not isinstance(groups, str) else [groups]  # type: ignore[list-item]
    for group in listed:
        if isinstance(group, str) or not isinstance(group, int):
            check_choice("groups", group, (*WHOLE, AUTO))
        else:
            check_int("groups", group, low=1)
    if not listed or len(set(listed)) < len(listed):
        raise SettingError("groups", allowed="a list of tensor, row, auto or numbers of columns, each once", got=groups)
    return listed


def scale_count(rows: int, columns: int, group: Group) -> int:
    """Return the number of scales of a layer.

    Args:
        rows: Output features.
        columns: Input features.
        group: What shares a scale.
    """
    if group == "tensor":
        return 1
    return rows * (1 if group in WHOLE else columns // group_of(group, columns))


def scale_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the scale of each row, fp32 holding values of fp16, shape (rows,).

    Args:
        weight: Shape (rows, columns).
        kind: One of SCALES.
    """
    size = weight.abs()
    scale = size.median(dim=1).values if kind == "median" else size.mean(dim=1)
    if kind == "least_squares":
        for _ in range(LLOYD_STEPS):  # the mean of those that become ±1 (Li et al., arXiv 1605.04711)
            kept = size > scale[:, None] / 2
            scale = (size * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    return scale.half().float().clamp(min=2.0**-24)
