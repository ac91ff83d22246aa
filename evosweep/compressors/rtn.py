"""Round to nearest: no calibration, no compensation."""

from collections.abc import Mapping

import torch

from evosweep.compressors.base import Plans
from evosweep.compressors.grid import Grid
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import Statistics


class RoundToNearest(IntegerLevels):
    """Rounds each weight to the nearest point of its group's min-max grid; needs no calibration inputs.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row.
        symmetric: Whether the zero is the middle code.
        coarse_scales: Whether scales are rounded to bfloat16, too.
    """

    needs: frozenset[str] = frozenset()

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
        grid = Grid.of(grouped, top=top, symmetric=self.symmetric, coarse=self.coarse_scales)
        return self.payload(
            codes=grid.codes(grouped).view(rows, columns),
            scales=grid.scale.view(rows, -1),
            zeros=grid.zero.view(rows, -1),
            width=width,
        )
