"""Dense safetensors of the winner: loads anywhere transformers does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from evosweep.core.checks import check_bool, check_int
from evosweep.core.errors import ExportError
from evosweep.core.files import new_folder
from evosweep.core.problem import Genome, Problem
from evosweep.evaluate.population import Evaluator
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.models.shrink import without_blocks, zeroed

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class DenseSafetensors:
    """Writes the dequantized weights in the model's own layout and type, with the tokenizer.

    Dropped blocks are left out. Dropped sub-blocks have no place in the model's own layout: theirs are zeros.

    Args:
        enabled: Whether to export at all.
        check_tokens: Validation tokens on which the reloaded model's logits are compared with the scored ones.
    """

    enabled: bool = True
    check_tokens: int = 128

    def __post_init__(self) -> None:
        check_bool("export.enabled", self.enabled)
        check_int("export.check_tokens", self.check_tokens, low=1)

    def export(
        self, genome: Genome, *, problem: Problem, evaluator: Evaluator, loaded: LoadedModel, folder: Path
    ) -> dict[str, Any]:
        """Write the model, reload it, compare.

        Returns:
            ``path``, ``bytes`` on disk, and ``max_logit_difference`` of the reloaded model.

        Raises:
            ExportError: The reloaded model says something else than what was scored; nothing is left then.
        """
        anatomy, drops = evaluator.anatomy, evaluator.store.drops
        weights = {
            unit.name: evaluator.weight(place, int(level))
            for place, (unit, level) in enumerate(zip(problem.units, genome, strict=True))
            if place not in drops
        }
        dropped = [drops[place] for place in drops if genome[place] == 0]
        silent = {drop["writer"] for drop in dropped if not drop["whole"]}
        blocks = {block for drop in dropped if drop["whole"] for block in drop["blocks"]}
        sites = [site for site in anatomy.sites if site.name in weights]
        with new_folder(folder) as temporary:
            with (
                torch.no_grad(),
                replaced_weights(sites, weights),
                zeroed([site for site in anatomy.sites if site.name in silent]),
                without_blocks(anatomy, blocks),
            ):
                loaded.model.save_pretrained(temporary)  # type: ignore[operator]
            loaded.tokenizer.save_pretrained(temporary)
            problem.decode(genome).save(temporary / "allocation.json", problem=problem.fingerprint)
            difference = self._difference(genome, evaluator, temporary)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"path": str(folder), "bytes": size, "max_logit_difference": difference}

    def _difference(self, genome: Genome, evaluator: Evaluator, folder: Path) -> float:
        anatomy = evaluator.anatomy
        window = evaluator.splits["validation"].windows[0][: self.check_tokens]
        tokens = torch.from_numpy(window)[None].to(anatomy.device)
        scored = evaluator.logits(genome, tokens)
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=anatomy.dtype)
        with torch.inference_mode():
            logits = reloaded.to(anatomy.device).eval()(input_ids=tokens).logits[0].float()
        difference = float((logits - scored).abs().max())
        scale = float(scored.abs().max())
        if not difference <= TOLERANCE[anatomy.dtype] * max(scale, 1.0):
            raise ExportError(
                f"the exported model does not say what was scored: logits differ by {difference:.3g} "
                f"(largest logit {scale:.3g}); nothing was kept"
            )
        return difference
