"""Dense safetensors of the winner: loads anywhere transformers does."""

from pathlib import Path
from typing import Any

import torch
import transformers

from evosweep.exporters.base import Exporter, Winner
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights


class DenseSafetensors(Exporter):
    """Writes the dequantized weights in the model's own layout and type, with the tokenizer.

    Dropped blocks are left out. Dropped sub-blocks have no place in the model's own layout: theirs are zeros.
    """

    loading = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write what ``save_pretrained`` writes."""
        weights = {
            site.name: winner.evaluator.weight(place, int(winner.genome[place]))
            for site, place in winner.levels.items()
        }
        model: Any = loaded.model
        with torch.no_grad(), replaced_weights(list(winner.levels), weights), winner.in_place():
            model.save_pretrained(folder)

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``from_pretrained``."""
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
        return model
