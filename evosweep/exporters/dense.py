"""Export as a dense checkpoint in the model's own layout, which every program for transformers loads."""

from pathlib import Path
from typing import Any

import torch
import transformers

from evosweep.exporters.base import Exporter, Winner
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights


class DenseSafetensors(Exporter):
    """Writes the dequantized weights in the model's own layout and type, with the tokenizer.

    Dropped blocks are left out. The model's own layout cannot leave sub-blocks out: dropped ones are zeros.
    """

    contents = "dequantized weights in the dense model's type"

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

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``from_pretrained``."""
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False
        )
        return model
