"""The column loop that GPTQ and SparseGPT share: settle a column, move its error onto those that follow.

Both are Optimal Brain Surgeon on a layer's output error, taken column by column with one factorization (Frantar et al.,
arXiv 2210.17323, section 3.3; Frantar and Alistarh, arXiv 2301.00774, section 3.2). Work is kept transposed, so that a
column of the weight is contiguous, and rows of several layers and levels go side by side.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from evosweep.core.errors import StoreError

DAMPING_TRIES = 6


def sweep(
    left: torch.Tensor,
    upper: torch.Tensor,
    *,
    spans: Sequence[tuple[int, int]],
    begin: Callable[[int], None],
    choose: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """Settle all columns, in place.

    Args:
        left: Weights transposed, fp32, shape (columns, rows); holds the settled values at the end.
        upper: What ``inverse_factor`` returns, shape (columns, columns).
        spans: Columns [start, stop) whose effect on the columns after them is applied at once; together all columns.
        begin: Told the first column of each span, when everything before it is settled and compensated.
        choose: Given a column's number and its compensated weights (rows,), returns its settled values (rows,).
    """
    for start, stop in spans:
        begin(start)
        part = left[start:stop]
        errors = torch.empty_like(part)
        factor = upper[start:stop, start:stop]
        pivots = factor.diagonal().tolist()
        for offset, pivot in enumerate(pivots):
            settled = choose(start + offset, part[offset])
            torch.sub(part[offset], settled, out=errors[offset]).div_(pivot)
            part[offset] = settled
            if offset + 1 < len(pivots):
                part[offset + 1 :].addr_(factor[offset, offset + 1 :], errors[offset], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)


def inverse_factor(gram: torch.Tensor, *, damping: float) -> torch.Tensor:
    """Return U, upper triangular, with UᵀU = (H + damping)⁻¹ and H = ``gram`` (GPTQ, section 3.3, step 3).

    Damping is raised tenfold, a few times, where H is still singular.

    Args:
        gram: fp32, shape (columns, columns).
        damping: Share of the mean diagonal added to the diagonal.

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


def spans_of(columns: int, *, edges: int, block: int) -> list[tuple[int, int]]:
    """Cut columns into spans of at most ``block`` that never cross a multiple of ``edges``."""
    cuts = {columns}
    for start in range(0, columns, edges):
        cuts.update(range(start, min(start + edges, columns), block))
    return list(pairwise(sorted(cuts)))
