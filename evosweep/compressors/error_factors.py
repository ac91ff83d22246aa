"""The product of two thin matrices that makes up best for a layer's error, of every rank at once.

For an error E = W − Ŵ (out, in) and the second moment H of the inputs, EoRA (Liu et al., arXiv 2410.21271, section 3.2)
takes H = QΛQᵀ, projects E' = E·QΛ^½, keeps the r largest singular values of E', and maps back by (QΛ^½)⁻¹. With U_r the
left singular vectors of E' that is U_r·U_rᵀ·E'·(QΛ^½)⁻¹ = U_r·(U_rᵀE): all that is needed are the leading eigenvectors
of E'E'ᵀ = E·H·Eᵀ, and nothing has to be inverted. LoRC (ZeroQuant-V2, Yao et al., arXiv 2303.08302, section 4) is the
same with H = 1.
"""

from dataclasses import dataclass

import torch

from evosweep.compressors.formats import plus_factors
from evosweep.core.seeds import generator

EXTRA = 16  # directions beyond the wanted ones that the iteration carries along
PASSES = 4  # applications of E·H·Eᵀ to the subspace


@dataclass(frozen=True)
class Corrections:
    """Factors of some errors of one layer, as they are stored, and what is left of the errors.

    Attributes:
        tensors: What ``formats.plus_factors.encode`` returned for all errors, stacked.
        errors: Output error with the first r ranks, for r from 0, shape (errors, ranks + 1).
    """

    tensors: dict[str, torch.Tensor]
    errors: list[list[float]]

    def first(self, index: int, rank: int) -> dict[str, torch.Tensor]:
        """Return the stored tensors of the first ranks of one error's factors."""
        return plus_factors.first_ranks({name: tensor[index] for name, tensor in self.tensors.items()}, rank)


def correct(
    differences: torch.Tensor, moment: torch.Tensor, *, rank: int, weighted: bool, factor_bits: int
) -> Corrections:
    """Return the factors that make up best for errors of one layer.

    Args:
        differences: Dense weight minus compressed weight, one or more, shape (errors, out, in).
        moment: Second moment of the layer's input, shape (in, in).
        rank: Largest rank wanted; that of smaller ranks comes first in the factors.
        weighted: Whether the output error is made smallest (EoRA) or that of the weights (LoRC).
        factor_bits: Bits of a stored value of the factors, 16 or 8.
    """
    left = leading_directions(differences, moment if weighted else None, rank=rank)
    right = left.mT @ differences
    right[..., moment.diagonal() == 0] = 0  # their inputs are always zero
    tensors = plus_factors.encode(left, right, factor_bits=factor_bits)
    return Corrections(tensors, errors_left(differences, moment, tensors))


def leading_directions(differences: torch.Tensor, moment: torch.Tensor | None, *, rank: int) -> torch.Tensor:
    """Return the leading eigenvectors of E·H·Eᵀ of every error E, the largest first, shape (errors, out, rank).

    They are found by subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) from directions
    that are the same for every layer of the same shape; exact where the subspace is as wide as the matrix.

    Args:
        differences: Shape (errors, out, in).
        moment: H, shape (in, in); None: the identity.
        rank: Number of eigenvectors.
    """
    _, rows, columns = differences.shape
    width = min(rank + EXTRA, rows, columns)
    start = generator(0, "low_rank", rows, columns).standard_normal((rows, width), dtype="float32")
    basis = torch.from_numpy(start).to(differences.device).expand(len(differences), -1, -1)

    def weighted(block: torch.Tensor) -> torch.Tensor:
        return block if moment is None else moment @ block

    for _ in range(PASSES):
        basis, _ = torch.linalg.qr(differences @ weighted(differences.mT @ basis))
    inside = differences.mT @ basis
    _, vectors = torch.linalg.eigh(inside.mT @ weighted(inside))
    return basis @ vectors.flip(-1)[..., :rank]


def errors_left(differences: torch.Tensor, moment: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[list[float]]:
    """Return tr((E − A_r·B_r)·H·(E − A_r·B_r)ᵀ) for the first r ranks of stored factors, r from 0, for every error.

    Args:
        differences: E, shape (errors, out, in).
        moment: H, shape (in, in).
        tensors: Stored factors A, B.
    """
    left, right = plus_factors.factors(tensors)
    seen = differences @ moment
    whole = (seen * differences).sum(dim=(1, 2), dtype=torch.float64)
    crossed = torch.einsum("nok,nok->nk", left, seen @ right.mT).double()
    among = (left.mT @ left).double() * (right @ moment @ right.mT).double()
    squared = among.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    rest = (whole[:, None] - 2 * crossed.cumsum(1) + squared).clamp(min=0)
    found: list[list[float]] = torch.cat([whole[:, None], rest], dim=1).tolist()
    return found
