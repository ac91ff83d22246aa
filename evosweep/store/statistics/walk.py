"""Measures the inputs of one block's layers while calibration text runs through it."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from evosweep.core.errors import StoreError
from evosweep.models.anatomy import Anatomy
from evosweep.store.statistics.base import InputBatch, Measurement, statistic_module


class _LastInput(Exception):
    """Ends a block's forward pass: no later layer is measured."""


def measure_inputs(
    anatomy: Anatomy, block: int, hidden: Sequence[torch.Tensor], *, needs: Collection[str], weighting: str
) -> dict[str, dict[str, Any]]:
    """Return the statistics of each shared input of a block: group name -> statistic -> value.

    Args:
        anatomy: The model.
        block: Index of the block.
        hidden: The block's inputs on calibration text, in batches (windows, seq_len, hidden).
        needs: Names of the statistics; those that are measured on the whole model are left out here.
        weighting: How tokens are weighted: ``relative`` or ``plain``.

    Raises:
        StoreError: An input is not finite.
    """
    kinds = {name: statistic_module(name) for name in sorted(needs)}
    kinds = {name: module for name, module in kinds.items() if hasattr(module, "Measurement")}
    leaders = [site for site in anatomy.sites_of(block) if site.group == site.name]
    found: dict[str, dict[str, Measurement]] = {}

    def count(group: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        if group not in found:
            width, device = args[0].shape[-1], args[0].device
            found[group] = {name: kind.Measurement(columns=width, device=device) for name, kind in kinds.items()}
        batch = InputBatch(args[0], weighting)
        for measurement in found[group].values():
            measurement.add(batch)
        if group == leaders[-1].name:
            raise _LastInput

    handles = [site.module.register_forward_pre_hook(partial(count, site.group)) for site in leaders]
    try:
        for batch in hidden:
            with suppress(_LastInput):
                anatomy.run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    values = {
        group: {name: measurement.finish() for name, measurement in measurements.items()}
        for group, measurements in found.items()
    }
    for group, statistics in values.items():
        _check_finite(group, statistics)
    return values


def _check_finite(group: str, statistics: dict[str, Any]) -> None:
    for value in statistics.values():
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
            raise StoreError(
                f"the calibration inputs of {group} hold NaN or Inf (or are too large to be squared); a model.dtype "
                "with more range may help, such as bfloat16 or float32"
            )
