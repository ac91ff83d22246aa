"""Makes the MSE-optimal grids of the standard normal distribution that compressor=vector rounds to.

    python benchmarks/gaussian_grids.py

One dimension: Lloyd's iteration on the density itself. Two dimensions: Lloyd's iteration on a fixed sample, from a
spiral whose density is the square root of the normal one's, which is optimal for many points (Zador). Prints the mean
squared error a coordinate, beside what no grid of that many points can go below, and writes
evosweep/compressors/gaussian_grids.safetensors.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from scipy.special import erf

from evosweep.core.seeds import generator

FILE = Path(__file__).parent.parent / "evosweep" / "compressors" / "gaussian_grids.safetensors"
ONE = [2**k for k in range(1, 9)]
TWO = [2**k for k in range(2, 13)]
Points = npt.NDArray[np.float64]


def one_dimensional(count: int, steps: int = 20000) -> Points:
    """Return the Lloyd-Max levels of the standard normal distribution, shape (count, 1)."""
    levels = np.sqrt(2) * np.linspace(-1.6, 1.6, count) if count < 64 else 5 * np.linspace(-1, 1, count)
    for _ in range(steps):
        cuts = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(cuts**2) / 2) / math.sqrt(2 * math.pi)
        mass = np.diff(erf(cuts / math.sqrt(2))) / 2
        levels = -np.diff(density) / np.maximum(mass, 1e-300)
    return (levels - levels[::-1])[:, None] / 2


def two_dimensional(count: int, sample: Points, steps: int) -> Points:
    """Return the centres of Lloyd's iteration on a sample, shape (count, 2)."""
    turn = np.pi * (3 - math.sqrt(5)) * np.arange(count)
    radius = np.sqrt(-2 * 2 * np.log1p(-(np.arange(count) + 0.5) / count))  # normal with twice the variance
    points = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for _ in range(steps):
        nearest = cKDTree(points).query(sample)[1]
        number = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, weights=axis, minlength=count) for axis in sample.T], axis=1)
        points = np.where(number[:, None] > 0, sums / np.maximum(number, 1)[:, None], points)
    return points


def error(points: Points, sample: Points) -> float:
    """Return the mean squared error a coordinate."""
    return float((cKDTree(points).query(sample)[0] ** 2).mean() / points.shape[1])


def main() -> None:
    """Write all grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    sample = generator(0, "grid").standard_normal((options.sample, 2))
    sample = np.concatenate([sample, -sample])
    fresh = generator(1, "grid").standard_normal((options.sample, 2))
    grids: dict[str, torch.Tensor] = {}
    for dimension, counts in ((1, ONE), (2, TWO)):
        for count in counts:
            points = one_dimensional(count) if dimension == 1 else two_dimensional(count, sample, options.steps)
            bits = math.log2(count) / dimension
            least = 2.0 ** (-2 * bits)
            found = error(points, fresh[:, :dimension])
            print(f"{dimension}-d {count:5d} points {bits:4.1f} bits  error {found:.6f}  bound {least:.6f}")
            grids[f"{dimension}x{count}"] = torch.from_numpy(points).float().contiguous()
    save_file(grids, FILE)


if __name__ == "__main__":
    main()
