"""Units that can be left out: attention and MLP sub-blocks, blocks, pairs of blocks."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.nn import functional

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError
from evosweep.models.anatomy import Anatomy
from evosweep.models.parts import GRANULARITIES, Part, parts_of
from evosweep.models.patch import silenced
from evosweep.parallel import all_reduce_sum

DROPPED, KEPT = "dropped", "kept"


class Drop:
    """What may be dropped.

    Args:
        granularity: ``sublayers`` (attention and MLP apart), ``blocks``, ``pairs`` of consecutive blocks; null: none.
        keep: Indices of blocks that must stay, negative ones from the end.

    Raises:
        SettingError: Unknown granularity, or an index is not a whole number.
    """

    def __init__(self, *, granularity: str | None = None, keep: Sequence[int] = ()) -> None:
        self.granularity = None if granularity is None else check_choice("granularity", granularity, GRANULARITIES)
        if isinstance(keep, str) or not isinstance(keep, Sequence):
            raise SettingError("keep", allowed="a list of block indices", got=keep)
        self.keep = tuple(check_int(f"keep[{place}]", index) for place, index in enumerate(keep))

    def describe(self) -> dict[str, Any]:
        """Return the settings, as part of the store's address."""
        return {"granularity": self.granularity, "keep": sorted(self.keep)}

    def parts(self, anatomy: Anatomy) -> tuple[Part, ...]:
        """Return what may be dropped of a model.

        Raises:
            SettingError: ``keep`` names a block that the model does not have.
        """
        count = len(anatomy.blocks)
        for place, index in enumerate(self.keep):
            check_int(f"keep[{place}]", index, low=-count, high=count - 1)
        stay = {index % count for index in self.keep}
        if self.granularity is None:
            return ()
        return tuple(part for part in parts_of(anatomy, self.granularity) if not stay & set(part.blocks))

    def rows(
        self,
        anatomy: Anatomy,
        parts: Sequence[Part],
        compressed: Collection[str],
        hidden: Sequence[torch.Tensor] | None,
    ) -> list[dict[str, Any]]:
        """Return the manifest's rows of some parts.

        A part's own cost is that of its parameters, but for the weights that are units themselves: those it gates.

        Args:
            anatomy: The model.
            parts: Some of ``parts``.
            compressed: Names of the layers that are units.
            hidden: What the first block of these parts is given on calibration text, in batches; null: not yet known.
        """
        rows = []
        for part in parts:
            gates = [name for name in part.sites if name in compressed]
            units = {id(site.module.weight) for site in anatomy.sites if site.name in gates}
            own = {id(p): p for p in part.parameters if id(p) not in units}.values()
            bits = sum(p.numel() * p.element_size() * 8 for p in own)
            levels = [
                {"name": DROPPED, "cost": 0, "nominal": {"kind": "kept", "number": 0.0}, "removed": 1.0},
                {"name": KEPT, "cost": bits, "nominal": {"kind": "kept", "number": 1.0}, "removed": 0.0},
            ]
            writer = None if part.writer is None else part.writer.name
            rows.append(
                {
                    "name": part.name,
                    "first": part.sites[0],
                    "block": part.blocks[0],
                    "numel": sum(p.numel() for p in own),
                    "levels": levels,
                    "gates": gates,
                    "drop": {"blocks": list(part.blocks), "whole": part.whole, "writer": writer},
                    "columns": {} if hidden is None else {"influence": influence(anatomy, part, hidden)},
                }
            )
        return rows


def influence(anatomy: Anatomy, part: Part, hidden: Sequence[torch.Tensor]) -> float:
    """Return 1 − mean cosine between the residual stream with and without a part.

    For whole blocks that is ShortGPT's block influence, of the blocks' input and output (arXiv 2403.03853, equation 1).

    Args:
        anatomy: The model.
        part: What is left out.
        hidden: What its first block is given, each (batch, seq_len, hidden).
    """
    sums = torch.zeros(2, dtype=torch.float64, device=anatomy.device)
    for batch in hidden:
        there = given = batch.to(anatomy.device)
        for block in part.blocks:
            there = anatomy.run_block(block, there)
        away = given
        if part.writer is not None:
            with silenced(part.writer.module):
                away = anatomy.run_block(part.blocks[0], given)
        cosine = functional.cosine_similarity(there.float(), away.float(), dim=-1)
        sums += torch.stack([cosine.sum(dtype=torch.float64), torch.tensor(cosine.numel()).to(sums)])
    all_reduce_sum(sums)
    return 1.0 - float(sums[0] / sums[1])
