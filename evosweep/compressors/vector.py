"""Rotated weights on MSE-optimal grids of one or two dimensions: HIGGS, with GPTQ's error compensation.

A rotation by random signs and Hadamard blocks makes a layer's weights nearly normal (QuIP#, Tseng et al., arXiv
2402.04396), so that one fixed grid, optimal for the standard normal distribution, serves all layers after
scaling (HIGGS, Malinovskii et al., arXiv 2411.17525). The second moment is rotated alike, so GPTQ's
objective is the same; a pair of columns is rounded together, to the point with the least error under the pair's block
of GPTQ's factor (GPTVQ, van Baalen et al., arXiv 2402.15319).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans, check_divides
from evosweep.compressors.compensate import factorize, spans_of, sums_by_matrix, sweep
from evosweep.compressors.formats import vector_grid
from evosweep.compressors.formats.vector_grid import rotated
from evosweep.compressors.groups import Group, check_fits, check_group, group_of
from evosweep.compressors.nearest import CellTable, cell_table
from evosweep.compressors.payload import Payload
from evosweep.compressors.rotation import Rotation
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

SIDES = ("none", "input", "both")


@dataclass(frozen=True)
class VectorSpec:
    """A level on a grid of points.

    Attributes:
        points: Of the grid.
    """

    points: int


class VectorGrids:
    """Error-compensating rounding of rotated weights, two at a time, to fixed grids with a scale a group of columns.

    Args:
        points: Points of each level's grid, powers of two, rising; log2(points) / dimension bits a weight.
        dimension: Weights that are rounded together: 1 or 2.
        group: Columns that share a scale; null means a whole row, ``auto`` and lists as in ``GPTQ``.
        rotate: Which sides of a weight are rotated: ``none``, ``input`` or ``both``.
        seed: Of the rotations.
        scale_factor: What scales are multiplied by; 1 makes each group's mean square 1.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        points: Sequence[int] = (16, 32, 64, 128, 256, 1024),
        dimension: int = 2,
        group: Group = None,
        rotate: str = "input",
        seed: int = 0,
        scale_factor: float = 1.0,
        damping: float = 0.01,
        column_block: int = 64,
    ) -> None:
        self.dimension = check_int("dimension", dimension, low=1, high=2)
        self.points = check_sizes(points, vector_grid.sizes(self.dimension))
        self.group = check_group("group", group, low=self.dimension)
        sizes = [self.group] if isinstance(self.group, int) else self.group or []
        if not isinstance(sizes, str) and any(size % self.dimension for size in sizes):
            raise SettingError("group", allowed=f"null or a multiple of the dimension, {self.dimension}", got=group)
        self.rotate = check_choice("rotate", rotate, SIDES)
        self.seed = check_int("seed", seed, low=0)
        self.scale_factor = check_number("scale_factor", scale_factor, low=0, exclusive=True)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a grid, named by its bits a weight and its dimension, ``2.5bit_2d``.

        Raises:
            SettingError: The group or the dimension does not divide some layer's input width.
        """
        check_fits(self.group, shapes, owner=self)
        check_divides("dimension", self.dimension, shapes, owner=self)
        return {name: self._levels(*shape) for name, shape in shapes.items()}

    def _group(self, columns: int) -> int:
        return group_of(self.group, columns, multiple=self.dimension)

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        levels = []
        for points in self.points:
            width = points.bit_length() - 1
            cost = vector_grid.bits(
                rows=rows, columns=columns, dimension=self.dimension, width=width, group=self._group(columns)
            )
            nominal = width / self.dimension
            levels.append(
                LevelSpec(f"{nominal:g}bit_{self.dimension}d", cost, Nominal("bits", nominal), VectorSpec(points))
            )
        return levels

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
        gram = statistics.second_moment
        jobs = [(name, level) for name in weights for level in plans[name]]
        turned = {name: self._rotated(weight, gram) for name, weight in weights.items()}
        if self.rotate != "none":
            gram = Rotation.of(len(gram), seed=self.seed, device=gram.device).conjugate(gram)
        made = quantize(
            [turned[name] for name, _ in jobs],
            gram,
            sizes=[level.spec.points for _, level in jobs],
            dimension=self.dimension,
            group=self._group(len(gram)),
            scale_factor=self.scale_factor,
            damping=self.damping,
            column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), (codes, scales, error) in zip(jobs, made, strict=True):
            width = level.spec.points.bit_length() - 1
            rows, columns = weights[name].shape
            meta = {"rows": rows, "columns": columns, "dimension": self.dimension, "width": width}
            turned_back = {"seed": self.seed, "rotated": self.rotate}
            tensors = vector_grid.encode(codes=codes, scales=scales, width=width)
            result[name][level.name] = Payload(vector_grid.__name__, tensors, meta | turned_back, error=error)
        return result

    def _rotated(self, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        alive = torch.where(gram.diagonal() == 0, 0.0, weight.float())
        return rotated(alive, seed=self.seed, sides=self.rotate)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {
            "points": self.points,
            "dimension": self.dimension,
            "group": self.group,
            "rotate": self.rotate,
            "seed": self.seed,
            "scale_factor": self.scale_factor,
            "damping": self.damping,
            "column_block": self.column_block,
        }


def check_sizes(points: object, known: Sequence[int]) -> list[int]:
    """Return the numbers of points that the argument ``points`` lists.

    Raises:
        SettingError: It is no rising list of numbers for which there is a grid.
    """
    sizes: list[int] = list(points) if isinstance(points, Sequence) and not isinstance(points, str) else [points]  # type: ignore[list-item]
    phrase = f"a rising list of some of {', '.join(map(str, known))}"
    if not sizes or sizes != sorted(set(sizes)) or any(isinstance(size, bool) or size not in known for size in sizes):
        raise SettingError("points", allowed=phrase, got=points)
    return sizes


@dataclass(frozen=True)
class VectorRules:
    """How a span of columns is rounded.

    Attributes:
        table: Grids of all rows.
        grid: Index of each row's grid, shape (rows,).
        scale: fp32 holding fp16 values, shape (rows,).
        codes: Filled with the indices of points, int16, shape (columns of the span / dimension, rows).
    """

    table: CellTable
    grid: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor


def finalize_vectors(span: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, rules: VectorRules) -> None:
    """Round the columns of a span, as many together as the grids have dimensions, in place, moving errors onwards.

    Of the points that may be nearest, that with the least Σ eⱼ² is taken, where eⱼ is what GPTQ's loop makes of a
    column's change: (wⱼ − qⱼ − Σ_{i<j} Uᵢⱼ·eᵢ) / Uⱼⱼ.

    Args:
        span: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        errors: Filled with each column's change divided by its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        rules: Grids, scales and codes.
    """
    dimension = rules.table.points.shape[1]
    blocks = factor.unfold(0, dimension, dimension).unfold(1, dimension, dimension).diagonal().permute(2, 0, 1)
    inverses = torch.linalg.inv(blocks)
    points = rules.table.points.T.contiguous()
    for start, inverse in zip(range(0, len(span), dimension), inverses, strict=True):
        stop = start + dimension
        scaled = span[start:stop] / rules.scale
        near = rules.table.near(scaled.T, rules.grid)
        change = scaled[:, :, None] - points[:, near]  # (dimension, rows, candidates)
        moved = (inverse.T @ change.view(dimension, -1)).view(change.shape)
        best = moved.square().sum(dim=0).argmin(dim=1, keepdim=True)
        chosen = near.gather(1, best)[:, 0]
        rules.codes[start // dimension] = (chosen - rules.table.first[rules.grid]).short()
        errors[start:stop] = moved.gather(2, best.expand(dimension, -1, -1))[:, :, 0] * rules.scale
        span[start:stop] = points[:, chosen] * rules.scale
        span[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)


def quantize(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    *,
    sizes: Sequence[int],
    dimension: int,
    group: int,
    scale_factor: float,
    damping: float,
    column_block: int,
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Return codes (rows, columns / dimension), scales (rows, groups) and output errors of weights that share an input.

    Args:
        weights: Each (rows, columns) with the same columns; not changed.
        gram: Second moment of the input, fp32, shape (columns, columns).
        sizes: Points of each weight's grid.
        dimension: Weights that are rounded together.
        group: Columns that share a scale; divides columns.
        scale_factor: What scales are multiplied by.
        damping: Share of the mean diagonal added to the diagonal.
        column_block: Columns whose effect on later columns is applied at once.

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    rows = [len(weight) for weight in weights]
    work = torch.cat([weight.T for weight in weights], dim=1).contiguous()
    kinds = tuple(sorted(set(sizes)))
    table = cell_table(dimension, kinds, work.device)
    counts = torch.tensor(rows, device=work.device)
    grid = torch.tensor([kinds.index(size) for size in sizes], device=work.device).repeat_interleave(counts)
    codes = torch.empty((len(work) // dimension, work.shape[1]), dtype=torch.int16, device=work.device)
    scales: list[torch.Tensor] = []

    def rules(columns: slice) -> VectorRules:
        if columns.start % group == 0:
            members = work[columns.start : columns.start + group]
            spread = members.square().mean(dim=0).sqrt_().mul_(scale_factor)
            scales.append(spread.half().float().clamp_(min=2.0**-24))
        vectors = slice(columns.start // dimension, columns.stop // dimension)
        return VectorRules(table, grid, scales[-1], codes[vectors])

    factor = factorize(gram, damping=damping)
    block = max(dimension, column_block - column_block % dimension)
    total = sweep(
        work, factor, spans=spans_of(len(work), edges=group, block=block), rules=rules, finalize=finalize_vectors
    )
    by_matrix = zip(codes.split(rows, 1), torch.stack(scales, dim=1).split(rows), strict=True)
    return [(own.T, scale, error) for (own, scale), error in zip(by_matrix, sums_by_matrix(total, rows), strict=True)]
