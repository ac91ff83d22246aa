"""A weight as it is, in whatever type it was stored."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.payload import Payload


def decode(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload] | None = None
) -> torch.Tensor:
    """Return the fp32 weight, shape (rows, columns).

    Args:
        tensors: ``weight``.
        meta: Not read.
        parts: None; this format holds no other payload.
    """
    del meta, parts
    return tensors["weight"].float()
