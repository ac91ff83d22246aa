"""Look-up tables: each weight is one of 2^bits values of its row's or its layer's table, which is learned.

Tables start as k-means of the weights, each weighted by its input's mean square (SqueezeLLM, Kim et al., arXiv
2306.07629, equation 4, with the second moment's diagonal as sensitivity). Then mapping and table are learned in turn
under the layer's output error tr((W − Ŵ)H(W − Ŵ)ᵀ): codes by GPTQ's column loop with the table as grid, and the table
by least squares given the codes, t = (SᵀHS)⁻¹SᵀHw for a row w with one-hot codes S, Ŵ = St (GANQ, Zhao and Yuan, arXiv
2501.12956, section 3.2; the same alternation is known as joint learning of codebook and mapping). Every row, or layer,
keeps the codes and the table with which its error was least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
        factor = factorize(gram, damping=self.damping)
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for name, weight in weights.items():
            alive = torch.where(gram.diagonal() == 0, 0.0, weight.float())
            for level in plans[name]:
                made = self._learned(alive, gram, factor, level.spec.bits)
                by_row = self.table == "row"
                tensors = lookup.encode(
                    codes=made.codes,
                    tables=made.tables if by_row else made.tables[:1],
                    scales=None if by_row else made.scales,
                    width=level.spec.bits,
                )
                meta = {"rows": weight.shape[0], "columns": weight.shape[1], "width": level.spec.bits}
                result[name][level.name] = Payload(lookup.__name__, tensors, meta, error=float(made.errors.sum()))
        return result

    def _learned(self, weight: torch.Tensor, gram: torch.Tensor, factor: Factor, width: int) -> "Mapped":
        """Return codes and tables of a layer after all rounds, the best of each row or of the layer."""
        scales = torch.ones(len(weight), device=weight.device)
        if self.table == "layer":
            scales = weight.square().mean(dim=1).sqrt_().half().float().clamp_(min=2.0**-24)
        importance = gram.diagonal().expand_as(weight)
        values = weight / scales[:, None]
        if self.table == "layer":
            values, importance = values.reshape(1, -1), (importance * scales.square()[:, None]).reshape(1, -1)
        tables = weighted_means(values, importance, 2**width).expand(len(weight), -1)
        dead = gram.diagonal() == 0
        best = mapped(weight, factor, tables, scales, dead=dead, column_block=self.column_block)
        found = best
        for _ in range(self.rounds):
            tables = best_tables(weight, gram, found, shared=self.table == "layer")
            best = best.better(found.with_tables(tables, weight, gram), shared=self.table == "layer")
            tables = tables.sort(dim=1).values
            found = mapped(weight, factor, tables, scales, dead=dead, column_block=self.column_block)
            best = best.better(found, shared=self.table == "layer")
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


def mapped(
    weight: torch.Tensor,
    factor: Factor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    *,
    dead: torch.Tensor,
    column_block: int,
) -> Mapped:
    """Return a layer's codes in its tables, found column by column, each column's error moved onto those after it.

    Args:
        weight: Shape (rows, columns).
        factor: Of the second moment of its input.
        tables: Values of fp16, rising, shape (rows, values).
        scales: Of each row, shape (rows,).
        dead: Which inputs are always zero, so that errors there do not count, shape (columns,).
        column_block: Columns whose effect on later columns is applied at once.
    """
    work = weight.T.contiguous().clone()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    grid = TableGrid(tables * scales[:, None])
    spans = spans_of(len(work), edges=len(work), block=column_block)
    errors = sweep(work, factor, spans=spans, rules=lambda columns: ColumnRules(grid, codes[columns]))
    errors -= torch.where(dead[:, None], work, 0.0).square().sum(dim=0)  # the factor counts them as inputs of size 1
    return Mapped(codes.T.contiguous(), tables, scales, errors)


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
        chosen = torch.nn.functional.one_hot(found.codes[rows].long(), count).float() * found.scales[rows, None, None]
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
