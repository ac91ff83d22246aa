"""Base class of exporters: writes an allocation, reloads it, and checks its logits."""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from evosweep.compressors.base import Compressor
from evosweep.core.checks import check_bool, check_int
from evosweep.core.errors import SettingError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import new_folder
from evosweep.core.problem import Genome, Problem
from evosweep.core.ties import Expansion, bits_to_tie, loose
from evosweep.core.unit import Level, Unit
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.card import write_card
from evosweep.exporters.folder import check_room, how_to_load, kept_aside
from evosweep.exporters.proof import proved
from evosweep.models.activations import NONE
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop, DropEffect, dropped_parameters, merged, removed
from evosweep.models.fusion import fused_layers
from evosweep.models.load import LoadedModel
from evosweep.models.patch import replaced_parameters, replaced_weights
from evosweep.models.slots import Slot
from evosweep.models.towers import CAUSAL, has_towers, loader_name
from evosweep.store.manifest import Stored
from evosweep.store.units import Units

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Winner:
    """An allocation applied to the model; tied units are taken apart, so that every unit is a layer.

    Attributes:
        genome: Level of every layer.
        problem: Layers and their levels.
        evaluator: Has the model and the levels.
    """

    genome: Genome
    problem: Problem
    evaluator: Evaluator

    def __post_init__(self) -> None:
        layers = self.evaluator.store.units
        counted = any(unit.active is not unit for unit in layers)  # perhaps by what is active for a token alone
        if counted or any(unit.members for unit in self.problem.units):
            most = sum(unit.levels[-1].cost for unit in layers)
            object.__setattr__(self, "genome", Expansion.of(self.problem.units, layers)(self.genome))
            object.__setattr__(self, "problem", replace(self.problem, units=layers, budget=most))

    @cached_property
    def slots(self) -> Mapping[Slot, int]:
        """The unit index of every slot that belongs to a unit."""
        indices = {unit.name: index for index, unit in enumerate(self.problem.units)}
        units = {slot: indices[slot.name] for slot in self.evaluator.anatomy.all_slots if slot.name in indices}
        return {slot: index for slot, index in units.items() if index not in self.evaluator.drops}

    def stored(self, index: int) -> Stored:
        """Return the level that a unit has, as the store keeps it."""
        unit = self.problem.units[index]
        return self.evaluator.store.payload(unit.name, unit.levels[int(self.genome[index])].name)

    @cached_property
    def dropped(self) -> list[DropEffect]:
        """Effects of the units that are dropped; a block without any of its sub-blocks is dropped as a whole."""
        effects = [effect for index, effect in self.evaluator.drops.items() if self.genome[index] == 0]
        return merged(self.evaluator.anatomy, effects)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Take what is dropped out of the model while the context lasts: blocks are gone, sub-blocks are zeros."""
        with removed(self.evaluator.anatomy, self.dropped):
            yield

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Make the original model what was chosen while the context lasts: its weights are the levels'."""
        evaluator = self.evaluator
        weights = {slot.name: evaluator.weight(index, int(self.genome[index])) for slot, index in self.slots.items()}
        with (
            replaced_weights(list(self.slots), weights),
            replaced_parameters(evaluator.anatomy.model, evaluator.tuned_values),
            self.in_place(),
        ):
            yield

    def layers(self) -> dict[str, tuple[Slot, int]]:
        """Return (slot, unit index) of all weights of units that are not dropped, by path while ``in_place``."""
        paths = {id(module): path for path, module in self.evaluator.anatomy.model.named_modules()}
        here = {slot: index for slot, index in self.slots.items() if id(slot.module) in paths}
        return {slot.path_at(paths[id(slot.module)]): (slot, index) for slot, index in here.items()}

    def others(self, *, without: Collection[int] = ()) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that belong to no unit, by name, tied ones once.

        Args:
            without: Ids of parameters to leave out as well.
        """
        model = self.evaluator.anatomy.model
        owners = dict(model.named_parameters(remove_duplicate=False))
        absent = {id(slot.parameter) for slot in self.slots} | set(without)
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, value in model.state_dict().items():
            if id(owners.get(name)) not in absent and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                tensors[name] = value
        return tensors

    def dropped_parameters(self) -> set[int]:
        """Return the ids of the parameters of dropped sub-blocks."""
        return dropped_parameters(self.evaluator.anatomy, self.dropped)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the allocation as the budget counts them."""
        return round(1e6 * self.problem.megabytes(self.problem.cost(self.genome)))

    @property
    def dense_bytes(self) -> int:
        """Bytes of all parameters in the model's type, without dropped blocks."""
        anatomy = self.evaluator.anatomy
        gone = {block for effect in self.dropped if effect.whole for block in effect.blocks}
        absent = {id(parameter) for block in gone for parameter in anatomy.blocks[block].parameters()}
        return sum(p.numel() * p.element_size() for p in anatomy.model.parameters() if id(p) not in absent)


@dataclass(frozen=True)
class Exporter:
    """Writes an allocation as a model, reloads it, and compares its logits with those of the original model.

    Args:
        enabled: Whether to export at all.
        check_tokens: Validation tokens on which the logits of the reloaded model, and those that were scored, are
            compared with those of the original model with the levels' weights in it.
    """

    enabled: bool = True
    check_tokens: int = 128
    loading: ClassVar[str]
    """Python code that makes a ``model`` of a ``folder``."""
    contents: ClassVar[str]
    """What is written, in a few words."""
    tolerance: ClassVar[Mapping[torch.dtype, float]] = TOLERANCE
    """Share of the largest logit by which a reloaded model's may differ, by the type of the model."""
    runs: ClassVar[bool] = True
    """Whether what is written is a model."""
    text_only: ClassVar[bool] = True
    """Whether the format holds text models alone, and no towers for images beside the decoder."""
    needs_ties: ClassVar[bool] = False
    """Whether engines that read the format fuse layers, so that these must share a level (``units.tie=fused``)."""

    def __post_init__(self) -> None:
        check_bool("enabled", self.enabled)
        check_int("check_tokens", self.check_tokens, low=1)

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError, before any work, where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        del compressor, units
        drop.check_export(anatomy)

    def check_problem(self, problem: Problem, anatomy: Anatomy, genome: Genome | None = None) -> None:
        """Raise SettingError, before the search, where the format cannot hold an allocation of the problem.

        A format overrides ``refusal`` and ``ties``, not this.

        Args:
            problem: As it will be searched: units, tied or not, with the names and costs of their levels.
            anatomy: The model.
            genome: The one allocation that is asked about, after a search; None: any.
        """
        if self.text_only and has_towers(anatomy.model):
            raise SettingError(
                "",
                owner=self,
                got=type(anatomy.model).__name__,
                allowed="of a format that holds the parts beside its text decoder: export=dense or export=packed",
            )
        asked = problem if genome is None else problem.only(genome)
        for layer in (layer for unit in asked.units for layer in unit.layers):
            refusals = {level.name: self.refusal(layer, level, anatomy) for level in layer.levels}
            fitting = [name for name, refusal in refusals.items() if not refusal]
            for name, refusal in refusals.items():
                if refusal:
                    nearest = _nearest(layer, name, fitting)
                    raise SettingError(
                        "",
                        owner=self,
                        got=f"{name} of {layer.name}",
                        allowed=f"of a format that holds it: {refusal}{nearest}",
                    )
        untied = loose(asked.units, self.ties(anatomy))
        if untied:
            layers = ", ".join(name.rpartition(".")[2] for name in untied[0])
            raise SettingError(
                "",
                owner=self,
                got=f"{layers} of block {anatomy.slot(untied[0][0]).block} with a level each",
                allowed="used with tied layers, as engines load these as one matrix of one width",
                hint=_how_to_tie(problem, untied, genome),
            )

    def refusal(self, layer: Unit, level: Level, anatomy: Anatomy) -> str:
        """Return why the format cannot hold a level of a layer, in a few words; nothing where it can.

        Args:
            layer: A layer, also one of a tied unit, or what can be dropped.
            level: One of its levels, with what is known before it is made: name, cost, nominal number.
            anatomy: The model, for the layer's shape: ``anatomy.slot(layer.name).shape``.
        """
        del layer, level, anatomy
        return ""

    def ties(self, anatomy: Anatomy) -> list[tuple[str, ...]]:
        """Return the names of layers that must share a level: what engines fuse, for a format that ``needs_ties``."""
        return fused_layers(anatomy) if self.needs_ties else []

    def expected_bytes(self, winner: Winner) -> int:
        """Return about how many bytes the weights will take on disk."""
        return winner.packed_bytes

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write everything but tokenizer, allocation and README.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        raise NotImplementedError

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the written model as a user would load it."""
        raise NotImplementedError

    def export(
        self,
        genome: Genome,
        *,
        problem: Problem,
        evaluator: Evaluator,
        loaded: LoadedModel,
        folder: Path,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write the model, reload it, compare.

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            loaded: The dense model with its tokenizer.
            folder: Where to write; replaced if it exists.
            progress: Shows beforehand how large the export will be.

        Returns:
            ``path``, ``bytes`` and ``size_mb`` on disk, ``max_logit_difference`` of the reloaded model,
            ``activations``: what its layers' inputs were rounded to for that, as they were scored, ``load``: code that
            makes a ``model`` of a ``folder``, ``how_to_load``: the same in one line with this folder.

        Raises:
            ExportError: No room on the disk, or the reloaded model gives other logits than were scored; it is kept
                beside ``folder`` then.
        """
        winner = Winner(genome, problem, evaluator)
        expected = self.expected_bytes(winner)
        check_room(folder, expected)
        (progress or Silent()).say(f"exporting {self.contents}, about {expected / 1e6:.1f} MB, to {folder}")
        with new_folder(folder) as temporary:
            self.write(winner, loaded, temporary)
            (loaded.processor or loaded.tokenizer).save_pretrained(temporary)
            problem.save(problem.decode(genome), temporary / "allocation.json", problem=problem.fingerprint)
            body = self._readme(winner, loaded)
            write_card(temporary, body, genome=genome, problem=problem, store=evaluator.store.key, loaded=loaded)
            with kept_aside(temporary, folder):
                difference = self._difference(winner, temporary)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {
            "path": str(folder),
            "bytes": size,
            "size_mb": round(size / 1e6, 3),
            "max_logit_difference": difference,
            "activations": evaluator.resources.activations,
            "load": self._loading(loaded),
            "how_to_load": how_to_load(self._loading(loaded), folder),
        }

    def _readme(self, winner: Winner, loaded: LoadedModel) -> str:
        return (
            f"# {loaded.name}, compressed with evosweep\n\n"
            f"{self.contents.capitalize()}: {self.expected_bytes(winner) / 1e6:.1f} MB, where the dense weights take "
            f"{winner.dense_bytes / 1e6:.1f} MB. `allocation.json` names the level of every unit.\n\n"
            f"{_activations_note(winner.evaluator.resources.activations)}"
            f'Load it with\n\n```python\nfolder = "."  # this folder\n\n{self._loading(loaded)}\n```\n'
        )

    def _loading(self, loaded: LoadedModel) -> str:
        """Return the code that loads what is written, with the class that holds all parts of the model."""
        return self.loading.replace(CAUSAL, loader_name(loaded.model))

    def _difference(self, winner: Winner, folder: Path) -> float:
        """Return the largest difference between the logits of the reloaded model and of the original one."""
        evaluator = winner.evaluator
        dtype = evaluator.anatomy.dtype
        split = evaluator.splits["validation"]
        window = split.windows[0][: None if split.pictures.inputs else self.check_tokens]  # an image cannot be cut
        tokens = torch.from_numpy(window)[None].to(evaluator.anatomy.device)
        # Some loaders draw progress bars of their own, whatever transformers' verbosity; some in the first pass.
        with torch.inference_mode(), redirect_stderr(io.StringIO()):
            reloaded = self.reload(folder, dtype=dtype).to(evaluator.anatomy.device).eval()
            return proved(winner, reloaded, tokens, tolerance=self.tolerance[dtype])


def _how_to_tie(problem: Problem, untied: Sequence[Sequence[str]], genome: Genome | None) -> str:
    """Return what makes untied layers share a level, and of a finished allocation by how much that enlarges it."""
    if genome is None:
        return "units.tie=fused ties them"
    more = bits_to_tie(problem.units, untied, genome) / 8e6
    return f"search with units.tie=fused (this allocation grows by {more:.3g} MB if each set takes its dearest level)"


def _nearest(layer: Unit, name: str, fitting: Sequence[str]) -> str:
    """Return which level of a layer is nearest in cost to one that a format does not hold, of those that it does."""
    cost = {level.name: level.cost for level in layer.levels}
    return (
        f"; the nearest that fits is {min(fitting, key=lambda other: abs(cost[other] - cost[name]))}" if fitting else ""
    )


def _activations_note(activations: str) -> str:
    """Return what a README says about activations: a checkpoint holds weights alone."""
    if activations == NONE:
        return ""
    return (
        f"It was scored with the inputs of its compressed layers rounded to {activations}. These files hold weights "
        "alone: that has to be set in the engine that runs them.\n\n"
    )
