"""The column loop that GPTQ and SparseGPT share: settle a column, move its error onto those that follow.

Both are Optimal Brain Surgeon on a layer's output error, taken column by column with one factorization (Frantar et al.,
arXiv 2210.17323, section 3.3; Frantar and Alistarh, arXiv 2301.00774, section 3.2). Work is kept transposed, so that a
column of the weight is contiguous, and rows of several layers and levels go side by side.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from evosweep.core.errors import StoreError

DAMPING_TRIES = 6
logger = logging.getLogger(__name__)


Settle = Callable[..., None]
"""Settles a span in place: ``settle(part, errors, factor, *more)``, part and errors (columns, rows)."""


def settle_columns(
    part: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, choose: Callable[[int, torch.Tensor], torch.Tensor]
) -> None:
    """Settle the columns of a span one after the other, each compensated for those before it; in place.

    Args:
        part: Weights transposed, shape (columns, rows); holds the settled values at the end.
        errors: Filled with what settling moved each column by, over its pivot; same shape.
        factor: The span's block of the factor's diagonal, shape (columns, columns).
        choose: Given a column's place and its compensated weights (rows,), returns its settled values (rows,).
    """
    for place in range(len(part)):
        settled = choose(place, part[place])
        torch.sub(part[place], settled, out=errors[place]).div_(factor[place, place])
        part[place] = settled
        if place + 1 < len(part):
            part[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)


def sweep(
    left: torch.Tensor,
    upper: torch.Tensor,
    *,
    spans: Sequence[tuple[int, int]],
    settle: Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Settle all columns, in place.

    Args:
        left: Weights transposed, fp32, shape (columns, rows); holds the settled values at the end.
        upper: What ``inverse_factor`` returns, shape (columns, columns).
        spans: Columns [start, stop) whose effect on the columns after them is applied at once; together all columns.
        settle: Settles one span, everything before it being settled and compensated: given its columns, and ``part``,
            ``errors`` and ``factor`` as ``settle_columns``.
    """
    for start, stop in spans:
        columns = slice(start, stop)
        errors = torch.empty_like(left[columns])
        settle(columns, left[columns], errors, upper[columns, columns])
        left[stop:].addmm_(upper[columns, stop:].T, errors, alpha=-1)


class Replayed:
    """A span's settling as one CUDA graph: hundreds of small operations in one launch. On a CPU, just the function.

    Args:
        settle: Changes its first tensors in place, all of them tensors of one device.
        changed: How many of its first arguments it changes.
    """

    def __init__(self, settle: Settle, *, changed: int) -> None:
        self.settle, self.changed = settle, changed
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Call the function, or replay it on copies in the places where it was recorded."""
        if tensors[0].device.type != "cuda":
            self.settle(*tensors)
            return
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self._graphs:
            self._graphs[key] = self._record(tensors)
        graph, places = self._graphs[key]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        for place, tensor in zip(places[: self.changed], tensors[: self.changed], strict=True):
            tensor.copy_(place)

    def _record(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        places = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.settle(*places)  # once for real: libraries set themselves up outside the recording
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.settle(*places)
        return graph, places


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
    mean, added = float(diagonal.mean()), 0.0
    for attempt in range(DAMPING_TRIES):
        step = damping * (10**attempt if attempt else 1)
        added += step
        diagonal += step * mean
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                if attempt:
                    logger.warning(
                        "a layer's second moment was singular; it was damped by %.3g of its mean diagonal instead of "
                        "%.3g (more tokens.calibration helps)", added, damping,
                    )
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
