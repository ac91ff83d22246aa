"""Scales of blocks of small floating-point numbers: from a block's largest value, or by search."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evosweep.compressors.formats.float_blocks import ELEMENTS, MOST_RATIO, Limits, power_of_two_below, rounded
from evosweep.compressors.grid_search import GridSearch

LEAST = 2.0**-24  # smallest scale: that of fp16
LEAST_E4M3 = 2.0**-9
HALF_REACH = 448.0  # largest number that 16-bit scales count on: of E5M2's range, the scales would be fp16's subnormals
WIDER = 1.5  # E2M1 has no 5: a block whose largest value becomes 4 has finer steps there
AT_ONCE = 2**20  # weights, times scales, that are tried at once


@dataclass(frozen=True)
class FloatSpec:
    """A level of floating-point numbers.

    Attributes:
        element: Name of the numbers' format.
        block: Columns that share a scale; None: a whole row.
        scale: Kind of the scales, as in ``formats.float_blocks``.
        saturates: Whether a power-of-two scale is rounded down, so that a block's largest values may be cut off, as
            the OCP specification has it; else up.
    """

    element: str
    block: int | None
    scale: str
    saturates: bool = False

    @property
    def reach(self) -> float:
        """The number that the largest value of a block becomes."""
        largest = ELEMENTS[self.element].largest
        return min(largest, HALF_REACH) if self.scale in ("fp16", "ratio") else largest


def whole_scale(weight: torch.Tensor, spec: FloatSpec) -> torch.Tensor:
    """Return what the scales of a level are relative to, fp32.

    Of ``nvfp4`` it is the layer's scale, at which the largest scale of a block is E4M3's largest number, shape (); of
    ``layer`` the layer's only scale, shape (); of ``ratio`` the rows' scales, shape (rows,); else 1.

    Args:
        weight: Transposed, shape (columns, rows).
        spec: The level.
    """
    largest = weight.abs().amax(dim=0)
    if spec.scale == "nvfp4":
        return (largest.amax() / (ELEMENTS["e4m3"].largest * spec.reach)).clamp(min=LEAST)
    if spec.scale == "layer":
        return (largest.amax() / spec.reach).clamp(min=LEAST)
    if spec.scale == "ratio":
        return (largest / spec.reach).half().float().clamp(min=LEAST)
    return torch.ones((), device=weight.device)


def scales_of(largest: torch.Tensor, spec: FloatSpec, *, whole: torch.Tensor) -> torch.Tensor:
    """Return scales that a level can hold, for blocks with these largest values; fp32, same shape.

    MX scales are 2^(⌊log2 largest⌋ − exponent of the element's largest value) (OCP Microscaling Formats 1.0, section
    6.3). With S the scale at which the largest value is the format's, ZeroQuant-FP's M1 is 2^⌈log2 S⌉ and its M2
    S_row / 2^⌊log2(S_row / S)⌋.

    Args:
        largest: Largest absolute weights of blocks, shape (rows,) or (blocks, rows).
        spec: The level.
        whole: What scales are relative to, as ``whole_scale`` returns it.
    """
    wanted = (largest / spec.reach).clamp(min=LEAST)
    if spec.scale == "e8m0" and spec.saturates:
        return power_of_two_below(largest.clamp(min=LEAST)) * 2.0 ** -ELEMENTS[spec.element].largest_exponent
    if spec.scale == "e8m0":
        below = power_of_two_below(wanted)
        return torch.where(below < wanted, 2 * below, below)
    if spec.scale == "ratio":
        return whole / power_of_two_below(whole / wanted).clamp(min=1, max=2.0**MOST_RATIO)
    if spec.scale == "nvfp4":
        relative = (wanted / whole).clamp(max=ELEMENTS["e4m3"].largest).to(torch.float8_e4m3fn).float()
        return relative.clamp(min=LEAST_E4M3) * whole
    if spec.scale == "layer":
        return whole.expand_as(wanted)
    return wanted if spec.scale == "fp32" else wanted.half().float()


def factors_of(spec: FloatSpec, search: GridSearch) -> Sequence[float]:
    """Return what a search multiplies a block's largest value by, the widest first.

    Scales that are powers of two apart are tried at half the block's range, at all of it and, where the range is cut
    off, at twice of it.

    Args:
        spec: The level.
        search: As its settings have it.
    """
    if spec.scale in ("e8m0", "ratio"):
        return (2.0, 1.0, 0.5) if spec.saturates else (1.0, 0.5)
    return [WIDER * factor for factor in search.factors]


def fit_scales(
    weight: torch.Tensor, spec: FloatSpec, search: GridSearch | None, *, whole: torch.Tensor
) -> torch.Tensor:
    """Return the scales of blocks, fp32, shape (blocks, rows).

    Args:
        weight: Of whole blocks, shape (blocks, columns a block, rows).
        spec: The level.
        search: Of each block's scale, the one with the least Σ|w − ŵ|^norm; None: that of its largest value.
        whole: What scales are relative to, as ``whole_scale`` returns it.
    """
    largest = weight.abs().amax(dim=1)
    if search is None or spec.scale == "layer":
        return scales_of(largest, spec, whole=whole)
    factors = torch.tensor(factors_of(spec, search), device=weight.device)
    size = weight[0].numel()
    step = max(1, AT_ONCE // (size * len(factors)))
    parts = zip(weight.split(step), largest.split(step), strict=True)
    few = factors.split(max(1, AT_ONCE // size))
    return torch.cat([_best(part, most, spec, few, norm=search.norm, whole=whole) for part, most in parts])


def _best(
    weight: torch.Tensor,
    largest: torch.Tensor,
    spec: FloatSpec,
    factors: Sequence[torch.Tensor],
    *,
    norm: float,
    whole: torch.Tensor,
) -> torch.Tensor:
    """Return the best scales of some blocks, of factors a few at a time; of equals, the widest's."""
    limits = Limits.of([spec.element], [1], weight.device)
    found = torch.empty_like(largest)
    least = torch.full_like(largest, torch.inf)
    for some in factors:
        scales = scales_of(largest * some[:, None, None], spec, whole=whole)
        by_column = scales[:, :, None]
        change = rounded(weight / by_column, limits).mul_(by_column).sub_(weight).abs_()
        error, index = change.pow_(norm).sum(dim=2).min(dim=0)
        found = torch.where(error < least, scales.gather(0, index[None])[0], found)
        least = torch.minimum(error, least)
    return found
