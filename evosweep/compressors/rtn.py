"""Round to nearest: no calibration, no compensation."""

from collections.abc import Mapping, Sequence

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.grid_search import GridSettings, fit_grid
from evosweep.compressors.groups import Group
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import Statistics


class RoundToNearest(IntegerLevels):
    """Rounds each weight to the nearest point of its group's grid; needs no calibration inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row, ``auto`` the largest of 128, 64 and 32 that
            divides a layer's input width (else its largest divisor below), a list its first that does.
        symmetric: Whether the zero is the middle code.
        coarse_scales: Whether scales are rounded to bfloat16, too.
        group_bits: Bits that a group is counted with beside its codes; null: 16 for its scale, and a width for its
            zero if asymmetric. Formats that keep more count more: 32 for ``export=mlx``.
        grid: ``minmax``, a group's range; or ``mse``, the part of the range at which Σ|w − ŵ|^norm is least.
        grid_norm: Exponent of that error, at least 1.
        grid_least: Smallest part of the range that is tried.
        grid_steps: How many parts are tried, from the whole range to the smallest.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: Group = 64,
        symmetric: bool = False,
        coarse_scales: bool = False,
        group_bits: int | None = None,
        grid: str = "minmax",
        grid_norm: float = 2.4,
        grid_least: float = 0.5,
        grid_steps: int = 11,
    ) -> None:
        search = GridSettings(grid=grid, norm=grid_norm, least=grid_least, steps=grid_steps)
        super().__init__(
            bits=bits,
            group=group,
            symmetric=symmetric,
            coarse_scales=coarse_scales,
            group_bits=group_bits,
            search=search,
        )

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers rounded to nearest.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: Not read: no statistic is needed.
            plans: What ``plan`` returned.
        """
        del statistics
        return {
            name: {level.name: self._round(weight, level.spec.bits) for level in plans[name]}
            for name, weight in weights.items()
        }

    def _round(self, weight: torch.Tensor, width: int) -> Payload:
        rows, columns = weight.shape
        grouped = weight.float().reshape(-1, self.group_of(columns))
        top = torch.full((len(grouped),), 2.0**width - 1, device=weight.device)
        search = self.search.searches[-1]
        grid = fit_grid(grouped, search, top=top, symmetric=self.symmetric, coarse=self.coarse_scales)
        return self.payload(
            codes=grid.codes(grouped).view(rows, columns),
            scales=grid.scale.view(rows, -1),
            zeros=grid.zero.view(rows, -1),
            width=width,
        )
