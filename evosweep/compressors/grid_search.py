"""Scale search: grids that are narrower than a group's range where that rounds most of its weights better."""

from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.grid import Grid
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError

GRIDS = ("minmax", "mse")
# Weights whose grids are searched at once: what a CPU's cache and a GPU's memory have room for.
AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


@dataclass(frozen=True)
class GridSearch:
    """How a group's grid is found: its range, times the factor at which Σ|w − ŵ|^norm is least.

    llm-compressor's mse observer and GPTQ's ``--mse`` do the same, with the same norm.

    Attributes:
        norm: Exponent of the error.
        factors: What the range is multiplied by, falling from 1.
    """

    norm: float
    factors: tuple[float, ...]

    @classmethod
    def of(cls, *, norm: float, least: float, steps: int) -> "GridSearch":
        """Return a search over ``steps`` factors from 1 to ``least``, evenly spaced.

        Args:
            norm: Exponent of the error.
            least: Smallest factor.
            steps: Number of factors.

        Raises:
            SettingError: The norm is below 1, ``least`` is not above 0 and below 1, or there are not 2 to 1000 steps.
        """
        check_number("grid_norm", norm, low=1)
        if check_number("grid_least", least, low=0, high=1, exclusive=True) == 1:
            raise SettingError("grid_least", allowed="above 0 and below 1", got=least)
        check_int("grid_steps", steps, low=2, high=1000)
        return cls(norm, tuple(1 - (1 - least) * step / (steps - 1) for step in range(steps)))

    def fit(self, weight: torch.Tensor, *, top: torch.Tensor, symmetric: bool, coarse: bool = False) -> Grid:
        """Return the best grid of each row; of equals, the widest.

        Args:
            weight: Values of one group, shape (rows, group).
            top: Largest code of each row, shape (rows,).
            symmetric: Whether the zero is the middle code.
            coarse: Whether scales are rounded to bfloat16, too.
        """
        step = max(1, AT_ONCE[weight.device.type] // weight.shape[1])
        parts = [
            self._fit(weight[start : start + step], top[start : start + step], symmetric, coarse)
            for start in range(0, len(weight), step)
        ]
        return parts[0] if len(parts) == 1 else joined(parts)

    def _fit(self, weight: torch.Tensor, top: torch.Tensor, symmetric: bool, coarse: bool) -> Grid:
        ends = torch.stack([weight.amin(dim=1), weight.amax(dim=1)], dim=1)
        found = whole = Grid.of(ends, top=top, symmetric=symmetric, coarse=coarse)
        best = torch.full_like(top, torch.inf)
        units = torch.empty_like(weight)
        change = torch.empty_like(weight)
        for factor in self.factors:
            grid = Grid.of(ends * factor, top=top, symmetric=symmetric, coarse=coarse)
            # In units of the grid's step, into buffers: a new tensor each time would take several times as long.
            torch.mul(weight, grid.inverse[:, None], out=units)
            torch.round(units, out=change)
            change.clamp_(-grid.zero[:, None], (top - grid.zero)[:, None]).sub_(units).abs_().pow_(self.norm)
            error = change.sum(dim=1).mul_((grid.scale / whole.scale).pow_(self.norm))
            better = error < best
            best = torch.where(better, error, best)
            found = _chosen(better, grid, found)
        return found


class GridSettings:
    """The settings of a compressor's grids.

    Args:
        grid: ``minmax`` or ``mse``.
        norm: Exponent of the error, at least 1.
        least: Smallest part of the range that is tried.
        steps: How many parts are tried.

    Raises:
        SettingError: A setting cannot be used; it is named as the compressor's own argument.
    """

    def __init__(self, *, grid: str = "minmax", norm: float = 2.4, least: float = 0.5, steps: int = 11) -> None:
        self.grid = check_choice("grid", grid, GRIDS)
        self.search = GridSearch.of(norm=norm, least=least, steps=steps)

    @property
    def searches(self) -> tuple[GridSearch | None, ...]:
        """The ways in which a layer's grids are found, the best of which is kept."""
        return (None,) if self.grid == "minmax" else (None, self.search)

    def describe(self) -> dict[str, Any]:
        """Return what decides payloads."""
        if self.grid == "minmax":
            return {"grid": self.grid}
        return {"grid": self.grid, "grid_norm": self.search.norm, "grid_factors": self.search.factors}


def fit_grid(
    weight: torch.Tensor, search: GridSearch | None, *, top: torch.Tensor, symmetric: bool, coarse: bool = False
) -> Grid:
    """Return each row's grid: by a search, or its range.

    Args:
        weight: Values of one group, shape (rows, group).
        search: Of the scale; None: minimum to maximum.
        top: Largest code of each row, shape (rows,).
        symmetric: Whether the zero is the middle code.
        coarse: Whether scales are rounded to bfloat16, too.
    """
    if search is None:
        return Grid.of(weight, top=top, symmetric=symmetric, coarse=coarse)
    return search.fit(weight, top=top, symmetric=symmetric, coarse=coarse)


def joined(grids: list[Grid]) -> Grid:
    """Return the grids of several sets of rows as one."""
    return Grid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat([grid.zero for grid in grids]),
        torch.cat([grid.top for grid in grids]),
    )


def _chosen(rows: torch.Tensor, new: Grid, old: Grid) -> Grid:
    """Return the new grid for the rows that are marked, the old one for all others."""
    return Grid(torch.where(rows, new.scale, old.scale), torch.where(rows, new.zero, old.zero), old.top)
