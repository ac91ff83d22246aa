"""What exporters share: the winner as the model holds it, and the proof that what was written says the same."""

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from evosweep.compressors.base import Compressor
from evosweep.core.checks import check_bool, check_int
from evosweep.core.errors import ExportError
from evosweep.core.files import new_folder
from evosweep.core.problem import Genome, Problem
from evosweep.evaluate.population import Evaluator
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.load import LoadedModel
from evosweep.models.shrink import without_blocks, zeroed
from evosweep.store.drop import Drop

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Winner:
    """An allocation seen from the model.

    Attributes:
        genome: Level of every unit.
        problem: Units and ladders.
        evaluator: Has the model and the levels.
    """

    genome: Genome
    problem: Problem
    evaluator: Evaluator

    @cached_property
    def levels(self) -> Mapping[Site, int]:
        """The place in the genome of every layer that is a unit."""
        places = {unit.name: place for place, unit in enumerate(self.problem.units)}
        drops = self.evaluator.store.drops
        sites = (site for site in self.evaluator.anatomy.sites if site.name in places)
        return {site: places[site.name] for site in sites if places[site.name] not in drops}

    @cached_property
    def silent(self) -> list[Site]:
        """Layers whose output no longer joins the residual stream: each ends a dropped sub-block."""
        writers = {drop["writer"] for drop in self._dropped if not drop["whole"]}
        return [site for site in self.evaluator.anatomy.sites if site.name in writers]

    @cached_property
    def blocks(self) -> set[int]:
        """Blocks that are dropped whole."""
        return {block for drop in self._dropped if drop["whole"] for block in drop["blocks"]}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be without what is dropped for a while: blocks out, sub-blocks silent."""
        with torch.no_grad(), zeroed(self.silent), without_blocks(self.evaluator.anatomy, self.blocks):
            yield

    def layers(self) -> dict[str, tuple[Site, int]]:
        """Return the layers that are units and still there, by their path while ``in_place``, with their places."""
        paths = {id(module): path for path, module in self.evaluator.anatomy.model.named_modules()}
        return {
            paths[id(site.module)]: (site, place) for site, place in self.levels.items() if id(site.module) in paths
        }

    def others(self, *, without: Collection[int] = ()) -> dict[str, torch.Tensor]:
        """Return the model's other tensors by name, tied ones once; none of the parameters with these ids."""
        model = self.evaluator.anatomy.model
        owners = dict(model.named_parameters(remove_duplicate=False))
        absent = {id(site.module.weight) for site in self.levels} | set(without)
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, value in model.state_dict().items():
            if id(owners.get(name)) not in absent and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                tensors[name] = value
        return tensors

    @property
    def _dropped(self) -> list[dict[str, Any]]:
        return [drop for place, drop in self.evaluator.store.drops.items() if self.genome[place] == 0]


@dataclass(frozen=True)
class Exporter:
    """Writes a winner, reloads it, and compares what it says with what was scored.

    Args:
        enabled: Whether to export at all.
        check_tokens: Validation tokens on which the reloaded model's logits are compared with the scored ones.
    """

    enabled: bool = True
    check_tokens: int = 128
    loading: ClassVar[str]
    """Code that makes a ``model`` of a ``folder``."""

    def __post_init__(self) -> None:
        check_bool("enabled", self.enabled)
        check_int("check_tokens", self.check_tokens, low=1)

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy) -> None:
        """Raise SettingError, before any work, where what a search may choose cannot be written."""

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write all but tokenizer and allocation."""
        raise NotImplementedError

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return what was written as a user would load it."""
        raise NotImplementedError

    def export(
        self, genome: Genome, *, problem: Problem, evaluator: Evaluator, loaded: LoadedModel, folder: Path
    ) -> dict[str, Any]:
        """Write the model, reload it, compare.

        Returns:
            ``path``, ``bytes`` on disk, ``max_logit_difference`` of the reloaded model, ``load``: code for it.

        Raises:
            ExportError: The reloaded model says something else than what was scored; nothing is left then.
        """
        with new_folder(folder) as temporary:
            self.write(Winner(genome, problem, evaluator), loaded, temporary)
            loaded.tokenizer.save_pretrained(temporary)
            problem.decode(genome).save(temporary / "allocation.json", problem=problem.fingerprint)
            difference = self._difference(genome, evaluator, temporary)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"path": str(folder), "bytes": size, "max_logit_difference": difference, "load": self.loading}

    def _difference(self, genome: Genome, evaluator: Evaluator, folder: Path) -> float:
        anatomy = evaluator.anatomy
        window = evaluator.splits["validation"].windows[0][: self.check_tokens]
        tokens = torch.from_numpy(window)[None].to(anatomy.device)
        scored = evaluator.logits(genome, tokens)
        # Some loaders draw bars of their own, whatever transformers' verbosity; some of them in the first pass.
        with torch.inference_mode(), redirect_stderr(io.StringIO()):
            reloaded = self.reload(folder, dtype=anatomy.dtype).to(anatomy.device).eval()
            logits = reloaded(input_ids=tokens).logits[0].float()
        difference = float((logits - scored).abs().max())
        scale = float(scored.abs().max())
        if not difference <= TOLERANCE[anatomy.dtype] * max(scale, 1.0):
            raise ExportError(
                f"the exported model does not say what was scored: logits differ by {difference:.3g} "
                f"(largest logit {scale:.3g}); nothing was kept"
            )
        return difference
