"""Base of integer quantizers: levels, costs, payloads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec
from evosweep.compressors.formats import grouped_int
from evosweep.compressors.grid_search import GridSettings
from evosweep.compressors.groups import Group, check_fits, check_group, group_of
from evosweep.compressors.payload import Payload
from evosweep.core.checks import check_bool, check_int
from evosweep.core.errors import SettingError
from evosweep.core.unit import Nominal

WIDTHS = range(2, 9)
SCALE_BITS = grouped_int.SCALE_BITS


@dataclass(frozen=True)
class IntegerSpec:
    """A level of integer codes.

    Attributes:
        bits: Width of a code.
    """

    bits: int


class IntegerLevels:
    """Bit-widths on a grid of groups.

    Args:
        bits: Code widths, each from 2 to 8, rising.
        group: Columns that share scale and zero; null means a whole row, ``auto`` the largest of 128, 64 and 32 that
            divides a layer's input width (else its largest divisor below), a list its first that does.
        symmetric: Whether the zero is the middle code (and so costs nothing).
        coarse_scales: Whether scales are rounded to bfloat16, too, for formats that keep them in the model's type.
        group_bits: Bits that a group is counted with beside its codes; null: 16 for its scale, and a width for its
            zero if asymmetric. Formats that keep more count more: 32 for ``export=mlx``.
        search: How grids are found.
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        group: Group = 64,
        symmetric: bool = False,
        coarse_scales: bool = False,
        group_bits: int | None = None,
        search: GridSettings | None = None,
    ) -> None:
        self.bits = check_widths(bits)
        self.search = search or GridSettings()
        self.group = check_group("group", group)
        self.symmetric = check_bool("symmetric", symmetric)
        self.coarse_scales = check_bool("coarse_scales", coarse_scales)
        self.group_bits = None if group_bits is None else check_int("group_bits", group_bits, low=SCALE_BITS)

    def group_of(self, columns: int) -> int:
        """Return the group size for a layer with so many input features."""
        return group_of(self.group, columns)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a width, named ``3bit``, its nominal number the width.

        Raises:
            SettingError: No group size divides some layer's input width.
        """
        check_fits(self.group, shapes, owner=self)
        return {name: self._levels(*shape) for name, shape in shapes.items()}

    def _levels(self, rows: int, columns: int) -> list[LevelSpec]:
        return [
            LevelSpec(
                name=f"{width}bit",
                cost=self._cost(rows, columns, width),
                nominal=Nominal("bits", float(width)),
                spec=IntegerSpec(width),
            )
            for width in self.bits
        ]

    def _cost(self, rows: int, columns: int, width: int) -> int:
        """Return how many bits a level takes, codes and groups."""
        group = self.group_of(columns)
        if self.group_bits is not None:
            return rows * columns * width + rows * (columns // group) * self.group_bits
        return grouped_int.bits(rows=rows, columns=columns, width=width, group=group, symmetric=self.symmetric)

    def payload(
        self,
        *,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        width: int,
        error: float | None = None,
    ) -> Payload:
        """Return the payload of a quantized layer.

        Args:
            codes: Codes, shape (rows, columns).
            scales: Values of fp16, shape (rows, groups).
            zeros: Whole numbers, shape (rows, groups).
            width: Bits a code.
            error: The layer's output error, where it is known.
        """
        rows, columns = codes.shape
        meta = {"rows": rows, "columns": columns, "width": width, "group": columns // scales.shape[1]}
        tensors = grouped_int.encode(
            codes=codes, scales=scales, zeros=None if self.symmetric else zeros.to(torch.uint8), width=width
        )
        return Payload(grouped_int.__name__, tensors, meta, error=error)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "coarse_scales": self.coarse_scales,
            **({} if self.group_bits is None else {"group_bits": self.group_bits}),
            **self.search.describe(),
        }


def check_widths(bits: object) -> list[int]:
    """Return the widths that the argument ``bits`` lists, from 2 to 8, rising.

    Raises:
        SettingError: They are no such list.
    """
    widths: list[int] = list(bits) if isinstance(bits, Sequence) and not isinstance(bits, str) else [bits]  # type: ignore[list-item]
    if not widths:
        raise SettingError("bits", allowed="a list of widths from 2 to 8", got=widths)
    for width in widths:
        check_int("bits", width, low=WIDTHS.start, high=WIDTHS.stop - 1)
    if widths != sorted(set(widths)):
        raise SettingError("bits", allowed="rising, each width once", got=widths)
    return widths
