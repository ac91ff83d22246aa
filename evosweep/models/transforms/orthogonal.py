"""Orthogonal matrices: random ones, and Hadamard matrices with random signs."""

import numpy as np
import numpy.typing as npt
import scipy.linalg

from evosweep.core.seeds import generator

Matrix = npt.NDArray[np.float64]
KINDS = ("hadamard", "orthogonal")
LARGEST_ORDER = 256  # of a Paley construction; larger sizes are Kronecker products


def rotation(size: int, *, kind: str, seed: int, purpose: str, keeps_mean: bool = False) -> Matrix:
    """Return an orthogonal matrix Q, shape (size, size), the same for the same seed and purpose.

    Args:
        size: Rows and columns.
        kind: ``orthogonal``, uniformly random; ``hadamard``, entries of magnitude 1 / sqrt(size) and random signs
            (QuaRot, arXiv 2404.00456, section 4), as far as a Hadamard matrix of that size is known: the rest of the
            size is a random orthogonal factor of a Kronecker product.
        seed: The user's seed.
        purpose: What it rotates.
        keeps_mean: Whether Q maps the vector of ones to itself, so that vectors of zero mean keep it.
    """
    rng = generator(seed, "rotation", purpose)
    if keeps_mean:
        return _keeping_ones(size, kind, rng)
    if kind == "orthogonal":
        return random_orthogonal(size, rng)
    order = hadamard_order(size)
    spread = np.kron(hadamard(order) / np.sqrt(order), random_orthogonal(size // order, rng))
    signs: Matrix = rng.choice([-1.0, 1.0], size)
    return signs[:, None] * spread


def random_orthogonal(size: int, rng: np.random.Generator) -> Matrix:
    """Return a uniformly random orthogonal matrix: QR of a Gaussian one, signs fixed (Mezzadri, math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    fixed: Matrix = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return fixed


def _keeping_ones(size: int, kind: str, rng: np.random.Generator) -> Matrix:
    """Return U diag(1, R) Uᵀ, where the first column of the orthogonal U is the normalized vector of ones.

    R is a random orthogonal matrix, or diagonal with random signs where U is made of Hadamard matrices; rows are then
    shuffled, which keeps the vector of ones as well.
    """
    order = hadamard_order(size)
    basis = np.kron(hadamard(order) / np.sqrt(order), _ones_first(size // order, rng))
    if kind == "orthogonal":
        inner = np.eye(size)
        inner[1:, 1:] = random_orthogonal(size - 1, rng)
        return basis @ inner @ basis.T
    signs = np.concatenate([[1.0], rng.choice([-1.0, 1.0], size - 1)])
    kept: Matrix = ((basis * signs) @ basis.T)[rng.permutation(size)]
    return kept


def _ones_first(size: int, rng: np.random.Generator) -> Matrix:
    """Return an orthogonal matrix whose first column is the normalized vector of ones, the others random."""
    start = rng.standard_normal((size, size))
    start[:, 0] = 1.0
    q, r = np.linalg.qr(start)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def hadamard_order(size: int) -> int:
    """Return the largest divisor of a size for which ``hadamard`` has a matrix."""
    return next(order for order in range(size, 0, -1) if size % order == 0 and _factors(order) is not None)


def hadamard(order: int) -> Matrix:
    """Return a Hadamard matrix, entries 1 and -1, whose first column is all ones.

    Sylvester's construction for powers of two, Paley's two constructions for 12, 20, 28, 36 ... , and their Kronecker
    products.

    Raises:
        ValueError: None is known here for this order.
    """
    factors = _factors(order)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    power, rest = factors
    made: Matrix = np.kron(scipy.linalg.hadamard(power).astype(np.float64), _paley(rest))
    return made * made[:, :1]  # rows with a -1 first change their sign


def _factors(order: int) -> tuple[int, int] | None:
    """Return a power of two and the order of a Paley matrix (or 1) whose product is ``order``; None: there are none."""
    power = order & -order
    if power == order:
        return order, 1
    for _ in range(power.bit_length()):
        rest = order // power
        if rest <= LARGEST_ORDER and _is_paley(rest):
            return power, rest
        power //= 2
    return None


def _is_paley(order: int) -> bool:
    first = order % 4 == 0 and _is_prime(order - 1)
    return first or (order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley(order: int) -> Matrix:
    """Return Paley's Hadamard matrix: type I where order - 1 is a prime, else type II with order / 2 - 1 a prime."""
    if order == 1:
        return np.ones((1, 1))
    if _is_prime(order - 1):
        core = np.pad(_residues(order - 1), ((1, 0), (1, 0)))
        core[0, 1:] = 1
        core[1:, 0] = -1
        return core + np.eye(order)
    half = order // 2
    core = np.pad(_residues(half - 1), ((1, 0), (1, 0)))
    core[0, 1:] = 1
    core[1:, 0] = 1
    made: Matrix = np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(half), [[1, -1], [-1, -1]])
    return made


def _residues(prime: int) -> Matrix:
    """Return the Jacobsthal matrix: 1 where the difference of row and column is a square modulo a prime, -1 else."""
    squares = {number * number % prime for number in range(1, prime)}
    character = np.array([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))])
    indices = np.arange(prime)
    jacobsthal: Matrix = character[(indices[:, None] - indices[None, :]) % prime]
    return jacobsthal
