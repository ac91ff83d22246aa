"""Look-up tables: each weight is one of 2^bits values of its row's or its layer's table, which is learned.

Tables start as k-means of the weights, each weighted by its input's mean square (SqueezeLLM, Kim et al., arXiv
2306.07629, with the second moment's diagonal as sensitivity). Then mapping and table are learned in turn under
the layer's output error tr((W − Ŵ)H(W − Ŵ)ᵀ): codes by GPTQ's column loop with the table as grid, and the table
by least squares given the codes, t = (SᵀHS)⁻¹SᵀHw for a row w with one-hot codes S, Ŵ = St (GANQ, Zhao and Yuan, arXiv
2501.12956). Every row, or layer, keeps the codes and the table with which its error was least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import one_hot, pad

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.compensate import ColumnRules, Factor, factorize, spans_of, sweep
from evosweep.compressors.formats import lookup
from evosweep.compressors.integer import IntegerSpec
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

MOST_BITS = 6
MEANS_STEPS = 15  # of k-means
RIDGE = 1e-4  # of a table's mean diagonal, towards the table before: a value that no weight uses stays where it is
AT_ONCE = 2**25  # numbers in memory at once


class LookupTables:
    """Error-compensating rounding to learned tables.

    Args:
        bits: Code widths, each from 1 to 6, rising.
        table: Whose tables there are: ``row``, or ``layer``, with a scale a row.
        rounds: How often codes and tables are learned in turn; 0: tables stay k-means.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4),
        table: str = "row",
        rounds: int = 1,
        damping: float = 0.01,
        column_block: int = 64,
    ) -> None:
        self.bits = check_table_widths(bits)
        self.table = check_choice("table", table, ("row", "layer"))
        self.rounds = check_int("rounds", rounds, low=0, high=20)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a width, named ``3bit_table``, its nominal number the width."""
        return {
            name: [
                LevelSpec(
                    name=f"{width}bit_table",
                    cost=lookup.bits(rows=rows, columns=columns, width=width, by_row=self.table == "row"),
                    nominal=Nominal("bits", float(width)),
                    spec=IntegerSpec(width),
                )
                for width in self.bits
            ]
            for name, (rows, columns) in shapes.items()
        }

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
        alive = {name: torch.where(gram.diagonal() == 0, 0.0, weight.float()) for name, weight in weights.items()}
        made = self._learned([alive[name] for name, _ in jobs], gram, [level.spec.bits for _, level in jobs])
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        by_row = self.table == "row"
        for (name, level), mapped_layer in zip(jobs, made, strict=True):
            width = level.spec.bits
            tensors = lookup.encode(
                codes=mapped_layer.codes,
                tables=mapped_layer.tables if by_row else mapped_layer.tables[:1],
                scales=None if by_row else mapped_layer.scales,
                width=width,
            )
            meta = {"rows": weights[name].shape[0], "columns": weights[name].shape[1], "width": width}
            result[name][level.name] = Payload(lookup.__name__, tensors, meta, error=float(mapped_layer.errors.sum()))
        return result

    def _learned(self, weights: Sequence[torch.Tensor], gram: torch.Tensor, widths: Sequence[int]) -> list["Mapped"]:
        """Return codes and tables of layers that share an input: after all rounds, the best of each row or layer.

        Args:
            weights: Each (rows, columns).
            gram: Second moment of their input.
            widths: Bits a code, of each.
        """
        shared = self.table == "layer"
        factor = factorize(gram, damping=self.damping)
        dead = gram.diagonal() == 0
        scales = [row_scales(weight) if shared else torch.ones_like(weight[:, 0]) for weight in weights]
        tables = [
            first_table(weight, gram, scale, 2**width, shared=shared)
            for weight, scale, width in zip(weights, scales, widths, strict=True)
        ]
        found = mapped(weights, factor, tables, scales, dead=dead, column_block=self.column_block)
        best = found
        for _ in range(self.rounds):
            tables = [best_tables(weight, gram, one, shared=shared) for weight, one in zip(weights, found, strict=True)]
            refitted = [
                one.with_tables(table, weight, gram) for one, table, weight in zip(found, tables, weights, strict=True)
            ]
            tables = [table.sort(dim=1).values for table in tables]
            found = mapped(weights, factor, tables, scales, dead=dead, column_block=self.column_block)
            best = [
                one.better(other, shared=shared).better(again, shared=shared)
                for one, other, again in zip(best, refitted, found, strict=True)
            ]
        return best

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {
            "bits": self.bits,
            "table": self.table,
            "rounds": self.rounds,
            "damping": self.damping,
            "column_block": self.column_block,
        }


def check_table_widths(bits: object) -> list[int]:
    """Return the widths that the argument ``bits`` lists, from 1 to MOST_BITS, rising.

    Raises:
        SettingError: They are no such list.
    """
    widths: list[int] = list(bits) if isinstance(bits, Sequence) and not isinstance(bits, str) else [bits]  # type: ignore[list-item]
    for width in widths:
        check_int("bits", width, low=1, high=MOST_BITS)
    if not widths or widths != sorted(set(widths)):
        raise SettingError("bits", allowed=f"a rising list of widths from 1 to {MOST_BITS}", got=widths)
    return widths


@dataclass(frozen=True)
class TableGrid:
    """Tables as the grids of a span of columns, the same for each.

    Attributes:
        table: Values of each row, rising, fp32, shape (rows, values).
    """

    table: torch.Tensor

    def at(self, column: int) -> "TableGrid":
        """Return the grid of a column."""
        del column
        return self

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the index of the value nearest to each weight; both of shape (rows,)."""
        return (weight[:, None] > (self.table[:, 1:] + self.table[:, :-1]) / 2).sum(dim=1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the fp32 weights that codes stand for; both of shape (rows,)."""
        return self.table.gather(1, codes[:, None])[:, 0]


@dataclass(frozen=True)
class Mapped:
    """A layer mapped to tables.

    Attributes:
        codes: uint8, shape (rows, columns).
        tables: fp32 holding fp16 values, shape (rows, values).
        scales: fp32 holding fp16 values, shape (rows,).
        errors: Of each row, shape (rows,).
    """

    codes: torch.Tensor
    tables: torch.Tensor
    scales: torch.Tensor
    errors: torch.Tensor

    def with_tables(self, tables: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> "Mapped":
        """Return the same codes with other tables.

        Args:
            tables: Values of fp16, shape (rows, values).
            weight: Dense, shape (rows, columns).
            gram: Second moment of its input, shape (columns, columns).
        """
        change = weight - tables.gather(1, self.codes.long()) * self.scales[:, None]
        return Mapped(self.codes, tables, self.scales, ((change @ gram) * change).sum(dim=1).clamp_(min=0))

    def better(self, other: "Mapped", *, shared: bool) -> "Mapped":
        """Return for each row, or for the layer where tables are shared, that of two mappings that errs less."""
        if shared:
            return other if float(other.errors.sum()) < float(self.errors.sum()) else self
        less = other.errors < self.errors
        return Mapped(
            codes=torch.where(less[:, None], other.codes, self.codes),
            tables=torch.where(less[:, None], other.tables, self.tables),
            scales=self.scales,
            errors=torch.where(less, other.errors, self.errors),
        )


def weighted_means(values: torch.Tensor, importance: torch.Tensor, count: int) -> torch.Tensor:
    """Return the k-means of every row's values, rising, values of fp16, shape (rows, count).

    They start at the middles of ``count`` equal shares of a row's sorted values.

    Args:
        values: Shape (rows, columns).
        importance: Weight of each, not negative, same shape.
        count: Means of a row.
    """
    starts = ((torch.arange(count, device=values.device) + 0.5) * values.shape[1] / count).long()
    means = values.sort(dim=1).values[:, starts]
    for _ in range(MEANS_STEPS):
        nearest = torch.searchsorted(((means[:, 1:] + means[:, :-1]) / 2).contiguous(), values.contiguous())
        mass = torch.zeros_like(means).scatter_add_(1, nearest, importance)
        moment = torch.zeros_like(means).scatter_add_(1, nearest, importance * values)
        means = torch.where(mass > 0, moment / mass, means).sort(dim=1).values
    return means.half().float()


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each row, values of fp16, shape (rows,)."""
    return weight.square().mean(dim=1).sqrt_().half().float().clamp_(min=2.0**-24)


def first_table(
    weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, count: int, *, shared: bool
) -> torch.Tensor:
    """Return the k-means of a layer's rows, or of the layer over its rows' scales, shape (rows, count).

    Args:
        weight: Shape (rows, columns).
        gram: Second moment of its input; the diagonal weighs the weights.
        scales: Of each row.
        count: Values of a table.
        shared: Whether all rows have one table.
    """
    importance = gram.diagonal().expand_as(weight)
    if not shared:
        return weighted_means(weight, importance, count)
    flat = (weight / scales[:, None]).reshape(1, -1)
    return weighted_means(flat, (importance * scales.square()[:, None]).reshape(1, -1), count).expand(len(weight), -1)


def mapped(
    weights: Sequence[torch.Tensor],
    factor: Factor,
    tables: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    *,
    dead: torch.Tensor,
    column_block: int,
) -> list[Mapped]:
    """Return layers' codes in their tables, found column by column, each column's error moved onto those after it.

    Args:
        weights: Each (rows, columns), of one input.
        factor: Of the second moment of the input.
        tables: Of each layer, values of fp16, rising, shape (rows, values).
        scales: Of each layer's rows, shape (rows,).
        dead: Which inputs are always zero, so that errors there do not count, shape (columns,).
        column_block: Columns whose effect on later columns is applied at once.
    """
    rows = [len(weight) for weight in weights]
    most = max(table.shape[1] for table in tables)
    values = [table * scale[:, None] for table, scale in zip(tables, scales, strict=True)]
    grid = TableGrid(torch.cat([pad(value, (0, most - value.shape[1]), value=torch.inf) for value in values]))
    work = torch.cat([weight.T for weight in weights], dim=1).contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    spans = spans_of(len(work), edges=len(work), block=column_block)
    errors = sweep(work, factor, spans=spans, rules=lambda columns: ColumnRules(grid, codes[columns]))
    errors -= torch.where(dead[:, None], work, 0.0).square().sum(dim=0)  # the factor counts them as inputs of size 1
    split = zip(codes.split(rows, 1), tables, scales, errors.split(rows), strict=True)
    return [Mapped(own.T.contiguous(), *facts) for own, *facts in split]


def best_tables(weight: torch.Tensor, gram: torch.Tensor, found: Mapped, *, shared: bool) -> torch.Tensor:
    """Return the tables with the least output error for given codes, values of fp16, shape (rows, values).

    Args:
        weight: Shape (rows, columns).
        gram: Second moment of its input, shape (columns, columns).
        found: Codes, scales, and the tables before.
        shared: Whether all rows have one table.
    """
    count = found.tables.shape[1]
    systems = []
    targets = []
    for start in range(0, len(weight), max(1, AT_ONCE // (count * weight.shape[1]))):
        rows = slice(start, start + max(1, AT_ONCE // (count * weight.shape[1])))
        chosen = one_hot(found.codes[rows].long(), count).float() * found.scales[rows, None, None]
        moved = (gram @ chosen.view(-1, weight.shape[1], count)).mT  # (rows, count, columns)
        systems.append(moved @ chosen)
        targets.append((moved @ weight[rows, :, None])[:, :, 0])
    system = torch.cat(systems)
    target = torch.cat(targets)
    if shared:
        system, target = system.sum(dim=0, keepdim=True), target.sum(dim=0, keepdim=True)
    before = found.tables[: len(system)]
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-20)
    system = system + torch.diag_embed(ridge[:, None].expand(-1, count))
    solved = torch.linalg.solve(system, target + ridge[:, None] * before)
    usable = solved.isfinite().all(dim=1, keepdim=True)
    return torch.where(usable, solved, before).half().float().expand(len(weight), -1)
