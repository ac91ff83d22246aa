"""The column loop that GPTQ and SparseGPT share: round or prune a column, move its error onto the columns that follow.

Both are Optimal Brain Surgeon on a layer's output error, one column at a time with one factorization (Frantar et al.,
arXiv 2210.17323, section 3.3; Frantar and Alistarh, arXiv 2301.00774, section 3.2). Weights are kept transposed, so
that a column is contiguous, and the rows of several layers and levels stand side by side.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from evosweep.compressors.grid import ColumnGrid, Grid, GridTable
from evosweep.core.errors import StoreError

DAMPING_TRIES = 6
ENTRIES_AT_ONCE = 2**28  # of the weights of all layers and levels: 1 GiB, of which the loop has about four copies
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factor:
    """A layer's second moment, factorized.

    Attributes:
        upper: U, upper triangular, with UᵀU = (H + damping·1)⁻¹, shape (columns, columns).
        damping: What was added to every entry of H's diagonal.
    """

    upper: torch.Tensor
    damping: float


@dataclass(frozen=True)
class ColumnRules:
    """What happens to the weights of a span of columns: rounding to a grid, removal by a mask, or both.

    Attributes:
        grid: Grids of its columns; None leaves values as they are.
        codes: uint8, shape (columns, rows), filled with the chosen codes; given with a grid.
        mask: True where a weight is kept, shape (columns, rows); None keeps all.
    """

    grid: ColumnGrid | None = None
    codes: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def finalize_columns(span: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, rules: ColumnRules) -> None:
    """Quantize and prune the columns of a span in order, in place, moving each error onto later columns (GPTQ).

    Args:
        span: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        errors: Filled with each column's change divided by its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        rules: Grid and mask of the span.
    """
    integer = rules.grid is None or isinstance(rules.grid, Grid | GridTable)  # what the kernels know
    kernels = working_kernels(span.device) if span.is_cuda and integer else None
    if kernels is not None:
        kernels.finalize_columns(span, errors, factor, grid=rules.grid, codes=rules.codes, mask=rules.mask)
        return
    for column in range(len(span)):
        final = span[column]
        if rules.grid is not None and rules.codes is not None:
            grid = rules.grid.at(column)
            chosen = grid.codes(final)
            rules.codes[column] = chosen
            final = grid.values(chosen)
        if rules.mask is not None:
            final = torch.where(rules.mask[column], final, 0.0)
        torch.sub(span[column], final, out=errors[column]).div_(factor[column, column])
        span[column] = final
        if column + 1 < len(span):
            span[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)


@functools.cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """Return the module of GPU kernels if they run on a device; None, with a warning, if the plain loop must be used.

    Triton comes with torch for CUDA, and needs a C compiler on the machine.
    """
    try:
        from evosweep.compressors import kernels  # noqa: PLC0415 - torch for CPUs comes without Triton

        trial = torch.eye(32, device=device)
        kernels.finalize_columns(trial.clone(), trial.clone(), trial)
    except Exception as error:  # the compiler's failures are of many kinds
        logger.warning("Triton does not work here (%s); level stores are built much slower", type(error).__name__)
        return None
    return kernels


def sweep(
    work: torch.Tensor,
    factor: Factor,
    *,
    spans: Sequence[tuple[int, int]],
    rules: Callable[[slice], Any],
    finalize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], None] = finalize_columns,
) -> torch.Tensor:
    """Round and prune all columns, in place, and return the error that this makes.

    The errors of the columns give the layer's: with E their matrix, W − Ŵ = E·U, so that the diagonal of
    (W − Ŵ)(H + damping·1)(W − Ŵ)ᵀ is that of E·Eᵀ.

    Args:
        work: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        factor: Of the layer's second moment H.
        spans: Columns [start, stop) whose effect on the columns after them is applied at once; together all columns.
        rules: Returns grid and mask of a span, called once everything before it is final and compensated.
        finalize: Makes a span final by its rules; of the same arguments as ``finalize_columns``.

    Returns:
        Each row's error, the diagonal of (W − Ŵ)·H·(W − Ŵ)ᵀ, shape (rows,).
    """
    upper = factor.upper
    before = work.clone()
    total = torch.zeros(work.shape[1], device=work.device)
    for start, stop in spans:
        columns = slice(start, stop)
        errors = torch.empty_like(work[columns])
        finalize(work[columns], errors, upper[columns, columns], rules(columns))
        total += errors.square().sum(dim=0)
        work[stop:].addmm_(upper[columns, stop:].T, errors, alpha=-1)
    return total.sub_(before.sub_(work).square_().sum(dim=0), alpha=factor.damping).clamp_(min=0)


def stack_transposed(weights: Sequence[torch.Tensor], gram: torch.Tensor) -> torch.Tensor:
    """Return matrices (rows, columns) side by side, as a new contiguous fp32 matrix (columns, all rows).

    Columns whose input is always zero are set to zero: their weights have no effect.

    Args:
        weights: The matrices.
        gram: Second moment of their shared input, shape (columns, columns).
    """
    work = torch.cat([weight.T.float() for weight in weights], dim=1)
    work[gram.diagonal() == 0] = 0
    return work


def parts_of(weights: Sequence[torch.Tensor], *, copies: int = 1) -> list[slice]:
    """Return consecutive parts of a list of matrices, each small enough for one sweep, or a single matrix.

    Args:
        weights: The matrices, shape (rows, columns).
        copies: How often each is in its sweep.
    """
    cuts = [0]
    entries = 0
    for index, weight in enumerate(weights):
        entries += copies * weight.numel()
        if entries > ENTRIES_AT_ONCE and index > cuts[-1]:
            cuts.append(index)
            entries = copies * weight.numel()
    return [slice(start, stop) for start, stop in pairwise([*cuts, len(weights)])]


def sums_by_matrix(row_values: torch.Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the sum over each matrix's rows, fetched from the device at once.

    Args:
        row_values: One number a row, the matrices' rows one after the other.
        sizes: Rows of each matrix.
    """
    found: list[float] = torch.stack([rows.sum() for rows in row_values.split(sizes)]).tolist()
    return found


def factorize(gram: torch.Tensor, *, damping: float) -> Factor:
    """Return the factor that GPTQ's step 3 (section 3.3) asks for, of H = ``gram``.

    With the order of the columns reversed, H = RRᵀ for an upper triangular R, and U = R⁻¹: one factorization and one
    triangular inverse. Damping is raised tenfold, a few times, where H is still singular.

    Args:
        gram: fp32, shape (columns, columns).
        damping: Share of the mean diagonal added to the diagonal.

    Raises:
        StoreError: H holds no finite numbers, or stays singular.
    """
    hessian = gram.flip(0, 1)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    added = 0.0
    identity = torch.eye(len(gram), device=gram.device)
    for attempt in range(DAMPING_TRIES):
        step = damping * (10**attempt if attempt else 1)
        added += step
        diagonal += step * mean
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            continue
        upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        if bool(upper.isfinite().all()):
            if attempt:
                logger.warning(
                    "a layer's second moment was singular; it was damped by %.3g of its mean diagonal instead of %.3g "
                    "(more tokens.calibration helps)",
                    added,
                    damping,
                )
            return Factor(upper.contiguous(), added * mean)
    raise StoreError(
        "the second moment of a layer's inputs could not be factorized; calibrate on more tokens "
        "(tokens.calibration) or raise compressor.damping"
    )


def spans_of(columns: int, *, edges: int, block: int) -> list[tuple[int, int]]:
    """Return spans [start, stop) of at most ``block`` columns that never cross a multiple of ``edges``.

    Args:
        columns: Number of columns.
        edges: No span contains a multiple of it inside.
        block: Largest width of a span.
    """
    cuts = {columns}
    for start in range(0, columns, edges):
        cuts.update(range(start, min(start + edges, columns), block))
    return list(pairwise(sorted(cuts)))
