"""GPTQ (Frantar et al., arXiv 2210.17323) for several bit-widths and several layers at once.

Layers that share an input share its Hessian and one factorization; every (layer, width) is then just more rows
of one column loop, each row with its own largest code.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from evosweep.compressors.base import Payload
from evosweep.compressors.integer import IntegerLevels, grid, to_codes
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import StoreError

DAMPING_TRIES = 6


class GPTQ(IntegerLevels):
    """Error-compensating rounding against the second moment of the layer's inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row.
        symmetric: Whether the zero is the middle code.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: int | None = 64,
        symmetric: bool = False,
        damping: float = 0.01,
        column_block: int = 32,
    ) -> None:
        super().__init__(bits=bits, group=group, symmetric=symmetric)
        self.damping = check_number("compressor.damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("compressor.column_block", column_block, low=1)

    def compress(
        self, weights: Mapping[str, torch.Tensor], gram: torch.Tensor
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share the input of ``gram``.

        Raises:
            StoreError: ``gram`` stays singular whatever the damping.
        """
        jobs = [(name, width) for name in weights for width in self.bits]
        stacked = torch.cat([weights[name].float() for name, _ in jobs])
        top = torch.cat(
            [torch.full((len(weights[name]),), 2.0**width - 1, device=gram.device) for name, width in jobs]
        )
        codes, scales, zeros = quantize(
            stacked, gram, top=top, group=self.group_of(stacked.shape[1]), symmetric=self.symmetric,
            damping=self.damping, column_block=self.column_block,
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        start = 0
        for name, width in jobs:
            rows = slice(start, start + len(weights[name]))
            start = rows.stop
            result[name][f"{width}bit"] = self.payload(
                codes=codes[rows], scales=scales[rows], zeros=zeros[rows], width=width
            )
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {**super().describe(), "damping": self.damping, "column_block": self.column_block}


def quantize(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    top: torch.Tensor,
    group: int,
    symmetric: bool,
    damping: float,
    column_block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows column by column, moving each column's error onto those that follow.

    Work is kept transposed, so that a column is contiguous.

    Args:
        weight: fp32, shape (rows, columns); not changed.
        gram: XᵀX up to a factor, fp32, shape (columns, columns).
        top: Largest code of each row, shape (rows,).
        group: Columns a group; divides columns.
        symmetric: Whether the zero is the middle code.
        damping: Share of the mean diagonal added to the diagonal.
        column_block: Columns whose effect on later columns is applied at once.

    Returns:
        codes uint8 (rows, columns), scales fp32 (rows, groups), zeros fp32 (rows, groups).

    Raises:
        StoreError: The Hessian cannot be factorized.
    """
    columns = weight.shape[1]
    left, dead = weight.T.contiguous().clone(), gram.diagonal() == 0
    left[dead] = 0  # an input that is always zero: its weight may as well be zero
    upper = inverse_factor(gram, damping=damping)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales, zeros = [], []
    for start, stop in _spans(columns, group, column_block):
        if start % group == 0:
            scale, zero = grid(left[start : start + group].T, top=top, symmetric=symmetric)
            scales.append(scale)
            zeros.append(zero)
        part, errors = left[start:stop], torch.empty_like(left[start:stop])
        factor = upper[start:stop, start:stop]
        pivots = factor.diagonal().tolist()
        for column, pivot in enumerate(pivots):
            chosen = to_codes(part[column], scale, zero, top)
            codes[start + column] = chosen.to(torch.uint8)
            torch.sub(part[column], (chosen - zero) * scale, out=errors[column]).div_(pivot)
            if column + 1 < len(pivots):
                part[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous(), torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def inverse_factor(gram: torch.Tensor, *, damping: float) -> torch.Tensor:
    """Return U, upper triangular, with UᵀU = (H + damping)⁻¹ and H = ``gram`` (GPTQ, section 3.3, step 3).

    Damping is raised tenfold, a few times, where H is still singular.

    Raises:
        StoreError: H holds no finite numbers, or stays singular.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    for attempt in range(DAMPING_TRIES):
        diagonal += damping * mean * (10**attempt if attempt else 1)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise StoreError(
        "the second moment of a layer's inputs could not be factorized; calibrate on more tokens "
        "(tokens.calibration) or raise compressor.damping"
    )


def _spans(columns: int, group: int, block: int) -> list[tuple[int, int]]:
    """Cut columns into spans of at most ``block`` that never cross a group's edge."""
    edges = {*range(0, columns, group), columns}
    for start in range(0, columns, group):
        edges.update(range(start, min(start + group, columns), block))
    ordered = sorted(edges)
    return list(pairwise(ordered))
