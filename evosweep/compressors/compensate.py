"""The column loop that GPTQ and SparseGPT share: settle a column, move its error onto those that follow.

Both are Optimal Brain Surgeon on a layer's output error, taken column by column with one factorization (Frantar et al.,
arXiv 2210.17323, section 3.3; Frantar and Alistarh, arXiv 2301.00774, section 3.2). Work is kept transposed, so that a
column of the weight is contiguous, and rows of several layers and levels go side by side.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch

from evosweep.compressors.grid import Grid
from evosweep.core.errors import StoreError

DAMPING_TRIES = 6
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
class Rules:
    """What the weights of a span may become: rounded to a grid, removed where masked, or both.

    Attributes:
        grid: Grid of each row; None leaves values as they are.
        codes: uint8, filled with the codes chosen, shape (columns, rows); there with a grid.
        mask: True where a weight is kept, shape (columns, rows); None keeps all.
    """

    grid: Grid | None = None
    codes: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def settle(part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, rules: Rules) -> None:
    """Settle the columns of a span one after the other, each compensated for those before it; in place.

    Args:
        part: Weights transposed, fp32, contiguous, shape (columns, rows); holds the settled values at the end.
        errors: Filled with what settling moved each column by, over its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        rules: What the weights may become.
    """
    kernels = working_kernels(part.device) if part.is_cuda else None
    if kernels is not None:
        kernels.settle(part, errors, factor, rules)
        return
    for place in range(len(part)):
        settled = part[place]
        if rules.grid is not None and rules.codes is not None:
            chosen = rules.grid.codes(settled)
            rules.codes[place] = chosen
            settled = rules.grid.values(chosen)
        if rules.mask is not None:
            settled = torch.where(rules.mask[place], settled, 0.0)
        torch.sub(part[place], settled, out=errors[place]).div_(factor[place, place])
        part[place] = settled
        if place + 1 < len(part):
            part[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)


@functools.cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """Return the GPU's kernels if they run on a device; None, with a warning, where the plain loop must do.

    Triton comes with torch for CUDA, and needs a C compiler on the machine.
    """
    try:
        from evosweep.compressors import kernels  # noqa: PLC0415 - there is no Triton beside torch for CPUs

        trial = torch.eye(32, device=device)
        kernels.settle(trial.clone(), trial.clone(), trial, Rules())
    except Exception as error:  # the compiler's failures are of many kinds
        logger.warning("Triton does not work here (%s); level stores are built much slower", type(error).__name__)
        return None
    return kernels


def sweep(
    left: torch.Tensor,
    factor: Factor,
    *,
    spans: Sequence[tuple[int, int]],
    rules: Callable[[slice], Rules],
) -> torch.Tensor:
    """Settle all columns, in place.

    What is settled tells the error made, too: with E the errors of all columns, W − Ŵ = E·U, so that the diagonal of
    (W − Ŵ)(H + damping·1)(W − Ŵ)ᵀ is that of E·Eᵀ.

    Args:
        left: Weights transposed, fp32, contiguous, shape (columns, rows); holds the settled values at the end.
        factor: Of the layer's second moment H.
        spans: Columns [start, stop) whose effect on the columns after them is applied at once; together all columns.
        rules: Says what the weights of a span may become, everything before it being settled and compensated.

    Returns:
        Each row's error, the diagonal of (W − Ŵ)·H·(W − Ŵ)ᵀ, shape (rows,).
    """
    upper, before = factor.upper, left.clone()
    total = torch.zeros(left.shape[1], device=left.device)
    for start, stop in spans:
        columns = slice(start, stop)
        errors = torch.empty_like(left[columns])
        settle(left[columns], errors, upper[columns, columns], rules(columns))
        total += errors.square().sum(dim=0)
        left[stop:].addmm_(upper[columns, stop:].T, errors, alpha=-1)
    return total.sub_(before.sub_(left).square_().sum(dim=0), alpha=factor.damping).clamp_(min=0)


def transposed(weights: Sequence[torch.Tensor], gram: torch.Tensor) -> torch.Tensor:
    """Return matrices (rows, columns) side by side, as a new contiguous fp32 (columns, all rows).

    Columns whose input is always zero are zero: they may as well be.
    """
    left = torch.cat([weight.T.float() for weight in weights], dim=1)
    left[gram.diagonal() == 0] = 0
    return left


def sums(total: torch.Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the sums over each matrix's rows, fetched from the device at once."""
    found: list[float] = torch.stack([each.sum() for each in total.split(sizes)]).tolist()
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
    mean, added = float(diagonal.mean()), 0.0
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
    """Cut columns into spans of at most ``block`` that never cross a multiple of ``edges``."""
    cuts = {columns}
    for start in range(0, columns, edges):
        cuts.update(range(start, min(start + edges, columns), block))
    return list(pairwise(sorted(cuts)))
