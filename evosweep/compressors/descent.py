"""Coordinate descent on a layer's output error: every code, scale and zero in turn takes its best value given the rest.

For codes this is QuantEase (Behdin et al., arXiv 2309.01885, equation 8 and algorithm 1). No step makes the error
larger. Codes are exact minimizers of one coordinate, on a grid; a group's scale is a least-squares fit, a zero the best
whole number. A sweep costs as much as two of GPTQ's.
"""

import torch

from evosweep.compressors.compensate import spans_of
from evosweep.compressors.rounding import Learned, Rounding, Target


def descend(rounding: Rounding, target: Target, *, sweeps: int, learned: Learned, column_block: int) -> Rounding:
    """Return codes and grids after some sweeps over all columns; what is given is changed.

    With D = W − Ŵ and G = H·Dᵀ, the best change of a weight of column j, all others as they are, is G_j / H_jj.

    Args:
        rounding: Where to start.
        target: Weights and second moment.
        sweeps: Over all columns; at least one.
        learned: What may change.
        column_block: Columns whose effect on others is applied at once.
    """
    gram = target.damped()
    gradient = gram @ (target.weight - rounding.values())
    for _ in range(sweeps):
        for group in range(len(rounding.scale)):
            _visit(rounding, group, gram, gradient, learned=learned, column_block=column_block)
    return rounding


def _visit(
    rounding: Rounding,
    group: int,
    gram: torch.Tensor,
    gradient: torch.Tensor,
    *,
    learned: Learned,
    column_block: int,
) -> None:
    """Improve one group's scale, zero and codes, in place, and bring the gradient up to date.

    Args:
        rounding: Codes and grids.
        group: Index of the group.
        gram: H, shape (columns, columns).
        gradient: H·(W − Ŵ)ᵀ, shape (columns, rows).
        learned: What may change.
        column_block: Columns whose effect on others is applied at once.
    """
    width = rounding.group
    columns = slice(group * width, (group + 1) * width)
    block = gram[columns, columns]
    before = rounding.values_of(group)
    local = gradient[columns].clone()
    if learned.scales:
        fit_scale(rounding, group, block, local, learned)
        if learned.zeros:
            shift_zero(rounding, group, block, local)
    if learned.rounding:
        for start, stop in spans_of(width, edges=width, block=column_block):
            span = slice(start, stop)
            change = round_span(
                rounding.codes[columns][span], local[span], block[span, span], rounding.scale[group], rounding.top
            )
            local[stop:].addmm_(block[stop:, span], change, alpha=-1)
    gradient.addmm_(gram[:, columns], rounding.values_of(group) - before, alpha=-1)


def round_span(
    codes: torch.Tensor, gradient: torch.Tensor, block: torch.Tensor, scale: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """Give the codes of a span of columns their best values one after the other, in place; return the weights' change.

    Args:
        codes: Shape (columns, rows), changed.
        gradient: H·(W − Ŵ)ᵀ of these columns, shape (columns, rows); used up.
        block: H of these columns.
        scale: Scale of every row, shape (rows,).
        top: Largest code of every row, shape (rows,).
    """
    diagonal = block.diagonal()
    steps = torch.where(diagonal > 0, diagonal, torch.inf).reciprocal()  # an input that is always zero changes nothing
    inverse = scale.reciprocal()
    changes = torch.empty_like(codes)
    for column in range(len(codes)):
        best = torch.addcmul(codes[column], gradient[column] * steps[column], inverse)
        best = best.round_().clamp_(min=0).minimum(top)
        torch.sub(best, codes[column], out=changes[column]).mul_(scale)
        codes[column] = best
        gradient[column + 1 :].addr_(block[column + 1 :, column], changes[column], alpha=-1)
    return changes


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
