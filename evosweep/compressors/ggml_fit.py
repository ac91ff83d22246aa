"""Scales and minima of ggml's blocks by weighted least squares, for many blocks at once.

The search is the one that llama.cpp's importance matrix steers (``make_qx_quants`` and ``make_qkx3_quants`` in
``ggml-quants.c``): ranges of several widths are tried, and for the codes that each gives the scale (and minimum) that
minimize Σ importance · error² have a closed form. Where scales are whole multiples of a block's ``d``, they and ``d``
are then improved in turn, with the codes that they really give.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from evosweep.compressors.formats.ggml_layout import Blocks, BlockType

HALVES = 256  # of units, on each side of zero, beyond which the outermost value is the nearest
SMALLEST = 2.0**-24  # of fp16
LARGEST = 65504.0
FEW = 32
ENTRIES_AT_ONCE = {"cpu": 2**17}  # that a core's cache holds
ENTRIES_ON_DEVICE = 2**24


@dataclass(frozen=True)
class FitSettings:
    """Settings of the search for scales.

    Attributes:
        steps: Ranges that are tried of each part.
        rounds: How often a block's ``d`` and its parts' multiples are improved in turn.
    """

    steps: int = 16
    rounds: int = 2


def fit_blocks(weight: torch.Tensor, importance: torch.Tensor, kind: BlockType, settings: FitSettings) -> Blocks:
    """Return the blocks of a matrix, row by row, each weight with the code that is nearest.

    Args:
        weight: fp32, shape (rows, columns).
        importance: Of every column, not negative, shape (columns,).
        kind: The type.
        settings: How hard scales are searched.
    """
    columns = weight.shape[1]
    weights = _usable(importance, kind.block).view(-1, kind.block)
    step = max(1, ENTRIES_AT_ONCE.get(weight.device.type, ENTRIES_ON_DEVICE) // columns)
    made = [
        _fit(some.reshape(-1, kind.block), weights.repeat(len(some), 1), kind, settings) for some in weight.split(step)
    ]
    names = [name for name, value in vars(made[0]).items() if value is not None]
    return Blocks(**{name: torch.cat([getattr(blocks, name) for blocks in made]) for name in names})


def nearest_codes(values: torch.Tensor, scale: torch.Tensor, added: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Return the codes of the nearest values of a grid, fp32, of the shape of ``values``.

    Args:
        values: Weights.
        scale: Of each weight's part, never zero; broadcasts.
        added: What the grid adds; broadcasts.
        kind: The type.
    """
    if kind.values is not None:
        halves = (values / scale).mul_(2).floor_().clamp_(-HALVES, HALVES - 1).add_(HALVES)
        return _codes_of_halves(kind.values, values.device)[halves.long()]
    return ((values - added) / scale + float(kind.zero or 0)).round_().clamp_(0, kind.top)


@functools.cache
def _codes_of_halves(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the code of the nearest value of every half unit from −HALVES on: borders lie on whole halves."""
    centre = (torch.arange(-HALVES, HALVES, device=device) + 0.5) / 2
    table = torch.tensor(values, dtype=torch.float32, device=device)
    return (centre[:, None] - table).abs().argmin(dim=1).float()


def _usable(importance: torch.Tensor, block: int) -> torch.Tensor:
    """Return importance with a small part of its block's mean added, so that no weight is free."""
    blocks = importance.float().view(-1, block)
    mean = blocks.mean(dim=1, keepdim=True)
    return torch.where(mean > 0, blocks / mean.clamp(min=1e-30), 1.0).clamp(min=1e-4)


def _fit(block: torch.Tensor, importance: torch.Tensor, kind: BlockType, settings: FitSettings) -> Blocks:
    """Return the blocks of weights (n, block), with importance of the same shape."""
    parts = block.unflatten(1, (-1, kind.part))
    weights = importance.unflatten(1, (-1, kind.part))
    scale, least = _fit_parts(parts, weights, kind, settings)
    if kind.scales is None:
        grid = Blocks(block, _half(scale[:, 0]), _plain_half(least[:, 0]) if kind.minima else None)
    else:
        grid = _improved(parts, weights, _quantized(scale, least, kind), kind, settings)
    scale, added = (values[:, :, None] for values in grid.grid(kind))
    return replace(grid, codes=nearest_codes(parts, scale, added, kind).to(torch.uint8).flatten(1))


Parts = tuple[torch.Tensor, torch.Tensor]
"""Scale and what is added, both of shape (n, parts)."""


def _units(codes: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Return what codes stand for in units of their scale."""
    if kind.values is not None:
        return torch.tensor(kind.values, dtype=torch.float32, device=codes.device)[codes.long()]
    return codes - float(kind.zero or 0)


def _fit_parts(parts: torch.Tensor, weights: torch.Tensor, kind: BlockType, settings: FitSettings) -> Parts:
    """Return the best scale and what is added of every part, before they are rounded."""
    best = torch.full(parts.shape[:2], torch.inf, device=parts.device)
    scale = torch.full_like(best, SMALLEST)
    added = torch.zeros_like(best)
    for trial, start in _trials(parts, kind, settings.steps):
        units = _units(nearest_codes(parts, trial[:, :, None], start[:, :, None], kind), kind)
        found, shift = (_line if kind.minima else _slope)(parts, weights, units, kind)
        off = units.mul_(-found[:, :, None]).add_(parts).sub_(shift[:, :, None])
        error = (weights * off.square_()).sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, found, scale)
        added = torch.where(better, shift, added)
    return scale, added


def _trials(parts: torch.Tensor, kind: BlockType, steps: int) -> Iterator[Parts]:
    """Yield scales to try: the range of a part, widened a little or shrunk, on the codes of the type."""
    shares = torch.linspace(1.1 if kind.top < 8 else 1.03, 0.5 if kind.top < 16 else 0.75, steps).tolist()
    if kind.minima:
        low = parts.amin(dim=2)
        high = parts.amax(dim=2)
        if kind.scales is not None:
            low = low.clamp(max=0)
        whole = (high - low).clamp(min=SMALLEST)
        for share in shares:
            for cut in (0.0, 0.5, 1.0):  # what is cut off: above, at both ends, below
                yield share * whole / kind.top, low + cut * (1 - share) * whole
        return
    extreme = parts.gather(2, parts.abs().argmax(dim=2, keepdim=True))[:, :, 0]
    extreme = torch.where(extreme.abs() < SMALLEST, SMALLEST, extreme)
    zero = float(kind.zero or 0)
    ends = (float(kind.values[0]), float(kind.values[-1])) if kind.values else (-zero, kind.top - zero)
    zeros = torch.zeros_like(extreme)
    for share in shares:
        yield share * extreme / ends[0], zeros
        if kind.top < FEW:  # one more code below zero than above is worth little where there are many
            yield share * extreme / ends[1], zeros


def _slope(parts: torch.Tensor, weights: torch.Tensor, units: torch.Tensor, kind: BlockType) -> Parts:
    """Return the scale that minimizes the weighted error of given units, and zeros."""
    del kind
    weighted = weights * units
    scale = (weighted * parts).sum(dim=2) / (weighted * units).sum(dim=2).clamp(min=1e-30)
    return torch.where(scale.abs() < SMALLEST, SMALLEST, scale), torch.zeros_like(scale)


def _line(parts: torch.Tensor, weights: torch.Tensor, units: torch.Tensor, kind: BlockType) -> Parts:
    """Return scale and what is added that minimize the weighted error; K types can add nothing positive."""
    total = weights.sum(dim=2)
    first = (weights * units).sum(dim=2)
    second = (weights * units.square()).sum(dim=2)
    value = (weights * parts).sum(dim=2)
    both = (weights * units * parts).sum(dim=2)
    determinant = total * second - first.square()
    usable = determinant > 1e-6 * total * second.clamp(min=1e-30)
    scale = torch.where(usable, (total * both - first * value) / determinant.clamp(min=1e-30), SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    added = (value - scale * first) / total
    if kind.scales is not None:
        alone = (both / second.clamp(min=1e-30)).clamp(min=SMALLEST)
        scale = torch.where(added > 0, alone, scale)
        added = added.clamp(max=0)
    return scale, added


def _half(value: torch.Tensor) -> torch.Tensor:
    """Return numbers of fp16, none of them zero."""
    sign = torch.where(value < 0, -1.0, 1.0)
    return (value.abs().clamp(SMALLEST, LARGEST) * sign).half()


def _plain_half(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-LARGEST, LARGEST).half()


def _multiples(scale: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return the whole multiples of d that are nearest to scales; never 0, as such a part is 0 with any scale."""
    found = (scale / d.float()[:, None]).round().clamp(low, high)
    return torch.where(found == 0, 1.0, found)


def _quantized(scale: torch.Tensor, least: torch.Tensor, kind: BlockType) -> Blocks:
    """Return blocks with their parts' scales rounded to multiples of ``d``, the largest to the largest multiple."""
    assert kind.scales is not None
    low, high = kind.scales
    extreme = scale.gather(1, scale.abs().argmax(dim=1, keepdim=True))[:, 0]
    d = _half(extreme / (low or high))  # signed types reach farther below zero
    grid = Blocks(codes=scale, d=d, scales=_multiples(scale, d, low, high))
    if not kind.minima:
        return grid
    m = _half(-least.amin(dim=1) / high)
    return replace(grid, m=m, minima=(-least / m.float()[:, None]).round().clamp(0, high))


def _errors(parts: torch.Tensor, weights: torch.Tensor, grid: Blocks, kind: BlockType) -> torch.Tensor:
    """Return each part's weighted error with its nearest codes, shape (n, parts)."""
    scale, added = (values[:, :, None] for values in grid.grid(kind))
    codes = nearest_codes(parts, scale, added, kind)
    return (weights * (parts - scale * _units(codes, kind) - added).square()).sum(dim=2)


def _neighbours(grid: Blocks, kind: BlockType) -> Iterator[Blocks]:
    """Yield grids whose parts' multiples are one more or one less."""
    assert kind.scales is not None and grid.scales is not None
    low, high = kind.scales
    for step in (-1, 0, 1):
        scales = (grid.scales + step).clamp(low, high)
        scales = torch.where(scales == 0, grid.scales, scales)
        if grid.minima is None:
            if step:
                yield replace(grid, scales=scales)
            continue
        for down in (-1, 0, 1):
            if step or down:
                yield replace(grid, scales=scales, minima=(grid.minima + down).clamp(0, high))


def _improved(
    parts: torch.Tensor, weights: torch.Tensor, grid: Blocks, kind: BlockType, settings: FitSettings
) -> Blocks:
    """Return a grid with multiples and ``d`` improved in turn; of each block the best that was seen."""
    best = grid
    lowest = _errors(parts, weights, grid, kind).sum(dim=1)
    for _ in range(settings.rounds):
        errors = _errors(parts, weights, grid, kind)
        moved = grid
        for trial in _neighbours(grid, kind):
            found = _errors(parts, weights, trial, kind)
            moved = _take(moved, trial, found < errors)
            errors = torch.minimum(errors, found)
        grid = _refitted(parts, weights, moved, kind)
        for candidate in (moved, grid):
            total = _errors(parts, weights, candidate, kind).sum(dim=1)
            best = _take(best, candidate, total < lowest)
            lowest = torch.minimum(lowest, total)
    return best


def _take(one: Blocks, other: Blocks, where: torch.Tensor) -> Blocks:
    """Return a grid with another's numbers where a mask of its parts (n, parts), or of its blocks (n,), says so."""
    made = {}
    for name in ("d", "m", "scales", "minima"):
        mine = getattr(one, name)
        if mine is None or (mine.dim() == 1 and where.dim() == 2):
            continue
        made[name] = torch.where(where if mine.dim() == where.dim() else where[:, None], getattr(other, name), mine)
    return replace(one, **made)


def _refitted(parts: torch.Tensor, weights: torch.Tensor, grid: Blocks, kind: BlockType) -> Blocks:
    """Return blocks whose fp16 scale ``d`` (and minimum ``m``) minimize the weighted error of their present codes."""
    assert grid.scales is not None
    scale, added = (values[:, :, None] for values in grid.grid(kind))
    units = _units(nearest_codes(parts, scale, added, kind), kind) * grid.scales[:, :, None]
    if grid.minima is None or grid.m is None:
        d = (weights * units * parts).sum(dim=(1, 2)) / (weights * units.square()).sum(dim=(1, 2)).clamp(min=1e-30)
        return replace(grid, d=_half(torch.where(d == 0, grid.d.float(), d)))
    down = -grid.minima[:, :, None].expand_as(units)
    one = (weights * units.square()).sum(dim=(1, 2))
    two = (weights * down.square()).sum(dim=(1, 2))
    mixed = (weights * units * down).sum(dim=(1, 2))
    first = (weights * units * parts).sum(dim=(1, 2))
    second = (weights * down * parts).sum(dim=(1, 2))
    determinant = one * two - mixed.square()
    usable = determinant > 1e-6 * one * two
    divisor = torch.where(usable, determinant, 1.0)
    d = torch.where(usable, (first * two - second * mixed) / divisor, grid.d.float()).clamp(min=SMALLEST)
    m = torch.where(usable, (second * one - first * mixed) / divisor, grid.m.float()).clamp(min=SMALLEST)
    return replace(grid, d=_half(d), m=_half(m))
