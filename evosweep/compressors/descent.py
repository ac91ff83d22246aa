"""Coordinate descent on a layer's output error: every code, scale and zero in turn takes its best value given the rest.

For codes this is QuantEase (Behdin et al., arXiv 2309.01885, equation 8 and algorithm 1). No step makes the error
larger: codes are exact minimizers of one coordinate on the grid, a group's scale is a least-squares fit, a zero the
best whole number. A sweep costs as much as two of GPTQ's, and rounds its columns in the same loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evosweep.compressors.compensate import ColumnRules, finalize_columns, spans_of
from evosweep.compressors.grid import Grid
from evosweep.compressors.rounding import Learned, Rounding, Target


@dataclass(frozen=True)
class Span:
    """Columns whose codes are chosen one after the other before their effect on others is applied.

    With D = W − Ŵ, G = H·Dᵀ and r_j = G_j / H_jj, the best value of column j is t_j = ŵ_j + r_j, all others as they
    are. A change δ_j = q(t_j) − ŵ_j lowers r_k by A_kj·δ_j for every later column k of the span, A_kj = H_kj / H_kk.
    Written in e = t − q(t), which is what the column loop of GPTQ moves on, t = ŵ + M·r + (1 − M)·e with M = (1 + A)⁻¹,
    A lower triangular without its diagonal: the loop runs as it does for GPTQ, from ŵ + M·r, with Mᵀ as its factor.

    Attributes:
        columns: In the group.
        inverse_diagonal: 1 / H_jj, zero for inputs that are always zero, shape (columns, 1).
        solve: M, shape (columns, columns).
        factor: Mᵀ, contiguous.
    """

    columns: slice
    inverse_diagonal: torch.Tensor
    solve: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, block: torch.Tensor, columns: slice) -> "Span":
        """Return a span of a group with H = ``block`` of its columns."""
        own = block[columns, columns]
        diagonal = own.diagonal()[:, None]
        inverse = torch.where(diagonal > 0, diagonal, torch.inf).reciprocal()
        lower = (own * inverse).tril(-1) + torch.eye(len(own), device=own.device)
        identity = torch.eye(len(own), device=own.device)
        solve = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        return cls(columns, inverse, solve, solve.T.contiguous())


def descend(rounding: Rounding, target: Target, *, sweeps: int, learned: Learned, column_block: int) -> Rounding:
    """Return codes and grids after some sweeps over all columns; what is given is changed.

    Args:
        rounding: Where to start.
        target: Weights and second moment.
        sweeps: Over all columns; at least one.
        learned: What may change.
        column_block: Columns whose effect on others is applied at once.
    """
    gram = target.damped()
    gradient = gram @ (target.weight - rounding.values())
    spans = []
    for start in range(0, len(gram), rounding.group):
        columns = slice(start, start + rounding.group)
        cuts = spans_of(rounding.group, edges=rounding.group, block=column_block)
        spans.append([Span.of(gram[columns, columns], slice(*cut)) for cut in cuts])
    for _ in range(sweeps):
        for group in range(len(rounding.scale)):
            _visit(rounding, group, gram, gradient, learned=learned, spans=spans[group])
    return rounding


def _visit(
    rounding: Rounding,
    group: int,
    gram: torch.Tensor,
    gradient: torch.Tensor,
    *,
    learned: Learned,
    spans: Sequence[Span],
) -> None:
    """Improve one group's scale, zero and codes, in place, and bring the gradient up to date.

    Args:
        rounding: Codes and grids.
        group: Index of the group.
        gram: H, shape (columns, columns).
        gradient: H·(W − Ŵ)ᵀ, shape (columns, rows).
        learned: What may change.
        spans: Of the group.
    """
    columns = slice(group * rounding.group, (group + 1) * rounding.group)
    block = gram[columns, columns]
    before = rounding.values_of(group)
    local = gradient[columns].clone()
    if learned.scales:
        fit_scale(rounding, group, block, local, learned)
        if learned.zeros:
            shift_zero(rounding, group, block, local)
    after = rounding.values_of(group)
    if learned.rounding:
        for span in spans:
            change = round_span(rounding, group, span, after, local)
            local[span.columns.stop :].addmm_(block[span.columns.stop :, span.columns], change, alpha=-1)
    gradient.addmm_(gram[:, columns], after.sub_(before), alpha=-1)


def round_span(
    rounding: Rounding, group: int, span: Span, values: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Give the codes of a span of columns their best values one after the other, in place; return the weights' change.

    Args:
        rounding: Codes and grids; the codes are changed.
        group: Index of the group.
        span: Columns of the group.
        values: The group's weights Ŵ as they are, shape (columns of the group, rows); changed.
        gradient: H·(W − Ŵ)ᵀ of the group's columns, same shape.
    """
    before = values[span.columns]
    work = torch.addmm(before, span.solve, gradient[span.columns] * span.inverse_diagonal)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    grid = Grid(rounding.scale[group], rounding.zero[group], rounding.top)
    finalize_columns(work, torch.empty_like(work), span.factor, ColumnRules(grid, codes))
    rounding.codes[group * rounding.group : (group + 1) * rounding.group][span.columns] = codes.float()
    change = work - before
    values[span.columns] = work
    return change


def fit_scale(rounding: Rounding, group: int, block: torch.Tensor, gradient: torch.Tensor, learned: Learned) -> None:
    """Set a group's scales to their least-squares values, as stored, where that lowers the error.

    With q = c − z, a change d of the scale changes the error by d²·q·H·qᵀ − 2·d·q·G.

    Args:
        rounding: Codes and grids; the scales are changed.
        group: Index of the group.
        block: H of its columns.
        gradient: H·(W − Ŵ)ᵀ of its columns, shape (columns, rows); brought up to date.
        learned: How scales are stored.
    """
    direction = rounding.codes[group * len(block) : (group + 1) * len(block)] - rounding.zero[group]
    pull = block @ direction
    curvature = (direction * pull).sum(dim=0)
    slope = (direction * gradient).sum(dim=0)
    before = rounding.scale[group].clone()
    wanted = learned.stored(before + torch.where(curvature > 0, slope / curvature, 0.0))
    change = wanted - before
    better = change * (2 * slope - change * curvature) > 0
    rounding.scale[group] = torch.where(better, wanted, before)
    gradient.addcmul_(pull, rounding.scale[group] - before, value=-1)


def shift_zero(rounding: Rounding, group: int, block: torch.Tensor, gradient: torch.Tensor) -> None:
    """Set a group's zeros to the best whole numbers for the codes as they are.

    A zero that is larger by k lowers all weights of the group by k·s.

    Args:
        rounding: Codes and grids; the zeros are changed.
        group: Index of the group.
        block: H of its columns.
        gradient: H·(W − Ŵ)ᵀ of its columns, shape (columns, rows); brought up to date.
    """
    pull = block.sum(dim=1)
    scale = rounding.scale[group]
    before = rounding.zero[group].clone()
    shift = torch.round(-gradient.sum(dim=0) / (pull.sum().clamp(min=1e-30) * scale))
    rounding.zero[group] = (before + shift).clamp_(min=0).minimum(rounding.top)
    gradient.addr_(pull, (rounding.zero[group] - before) * scale)
