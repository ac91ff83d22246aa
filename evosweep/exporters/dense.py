"""Export as a dense checkpoint in the model's own layout, which every program for transformers loads."""

from pathlib import Path
from typing import Any

import torch

from evosweep.exporters.base import Exporter, Winner
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.models.towers import loader_of


class DenseSafetensors(Exporter):
    """Writes the dequantized weights in the model's own layout and type, with the tokenizer.

    Dropped blocks are left out, and the others numbered anew; a block without attention and MLP is a dropped block. The
    model's own layout cannot leave out one of the two: dropped ones are zeros. (Configurations of transformers 5.23 can
    name sub-blocks to skip under ``per_layer_config``, but none of its models reads that.)
    """

    contents = "dequantized weights in the dense model's type"
    text_only = False
    loading = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"

    def expected_bytes(self, winner: Winner) -> int:
        """Return the bytes of the model's parameters, without dropped blocks."""
        return winner.dense_bytes

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write what ``save_pretrained`` writes.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        weights = {
            slot.name: winner.evaluator.weight(index, int(winner.genome[index])) for slot, index in winner.slots.items()
        }
        model: Any = loaded.model
        with torch.no_grad(), replaced_weights(list(winner.slots), weights), winner.in_place():
            model.save_pretrained(folder)

    def _readme(self, winner: Winner, loaded: LoadedModel) -> str:
        zeros = sum(not effect.whole for effect in winner.dropped)
        note = (
            f"{zeros} attention or MLP sub-blocks were dropped alone. This layout has a place for them, so they are "
            "zeros: no bytes and no time are saved by them here.\n\n"
        )
        blocks = sum(len(effect.blocks) for effect in winner.dropped if effect.whole)
        gone = f"{blocks} blocks were dropped and are left out; the others are numbered anew.\n\n" if blocks else ""
        return f"{super()._readme(winner, loaded).rstrip()}\n\n{gone}{note if zeros else ''}"

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``from_pretrained``."""
        model: torch.nn.Module = loader_of(folder).from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
        return model
