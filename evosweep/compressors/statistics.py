"""Statistics that calibration measured for a compressor: one value for each name in its ``needs``."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from evosweep.core.errors import StoreError

SECOND_MOMENT = "second_moment"
SECOND_MOMENT_DIAGONAL = "second_moment_diagonal"
INPUT_SQUARE = "input_square"
OUTPUT_GRADIENT_SQUARE = "output_gradient_square"


@dataclass(frozen=True)
class Statistics:
    """Measurements of one input that some layers share, and of these layers' outputs.

    A name is that of a module of ``evosweep.store.statistics``, or the dotted path of a module elsewhere. Reading a
    statistic that was not declared raises StoreError: it was not measured.

    Attributes:
        values: The measurements by name.
    """

    values: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Return the statistic of a name.

        Raises:
            StoreError: The compressor did not declare it in ``needs``.
        """
        if name not in self.values:
            declared = ", ".join(sorted(self.values)) or "none"
            raise StoreError(f"a compressor reads the statistic {name!r} but declares {declared} in its `needs`")
        return self.values[name]

    def only(self, needs: Collection[str]) -> "Statistics":
        """Return the statistics that a compressor declared, without the others.

        Raises:
            StoreError: One of ``needs`` was not measured.
        """
        return Statistics({name: self.get(name) for name in needs})

    @property
    def second_moment(self) -> torch.Tensor:
        """Mean of w·x xᵀ over the input's tokens x, fp32, shape (in, in); the Hessian of GPTQ and SparseGPT.

        The token weights w are the store's ``token_weighting``.
        """
        value: torch.Tensor = self.get(SECOND_MOMENT)
        return value

    @property
    def second_moment_diagonal(self) -> torch.Tensor:
        """Diagonal of ``second_moment``, fp32, shape (in,); it costs a d-th of the whole matrix."""
        value: torch.Tensor = self.get(SECOND_MOMENT_DIAGONAL)
        return value

    @property
    def input_square(self) -> torch.Tensor:
        """Mean of x_j² over the input's tokens, every token counted once, fp32, shape (in,)."""
        value: torch.Tensor = self.get(INPUT_SQUARE)
        return value

    @property
    def output_gradient_square(self) -> Mapping[str, torch.Tensor]:
        """Unit name -> mean over tokens of (∂L/∂y)² of the dense model, fp32, shape (out,).

        y is the layer's output, L the sum of the next-token losses of a window (nats).
        """
        value: Mapping[str, torch.Tensor] = self.get(OUTPUT_GRADIENT_SQUARE)
        return value
