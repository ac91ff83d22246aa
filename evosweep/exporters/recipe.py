"""Export as recipes: the allocation in the words of other quantizers, which then make a model of their own with it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from evosweep.compressors.base import Compressor
from evosweep.core.checks import check_bool, check_choice
from evosweep.core.errors import ExportError, SettingError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import new_folder, write_text
from evosweep.core.problem import Genome, Problem
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Exporter, Winner
from evosweep.exporters.recipes.listing import Listing, Setting, Tool, fitted
from evosweep.exporters.recipes.read_levels import listing_of, planned_setting
from evosweep.exporters.recipes.tools import TOOLS
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.units import Units

ALL = "all"
ROUNDS_AGAIN = (
    "A recipe carries the allocation, not the weights that were scored: these tools round the base model again, with "
    "scales of their own, so figures will differ somewhat from those of the search."
)


@dataclass(frozen=True)
class Recipe(Exporter):
    """Writes the allocation as text for other tools, each file with the command that reads it.

    Args:
        format: Name of a tool, or ``all``: every tool that can make these levels.
        nearest: Whether a width that a tool does not have becomes the nearest one that it has, wider before narrower.
            Every such change is listed in the README.
    """

    format: str = ALL
    nearest: bool = False
    contents = "recipes for other quantizers"
    loading = ""
    runs = False
    text_only = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("format", self.format, (ALL, *TOOLS))
        check_bool("nearest", self.nearest)

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the tool cannot make a level that a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        if self.format == ALL:
            return
        made = units.compressors(anatomy) if units is not None else {}
        plans = {**compressor.plan({slot.name: slot.shape for slot in (units or Units()).layers(anatomy)})}
        plans |= units.plan(anatomy) if units is not None else {}
        config: Any = anatomy.model.config
        for slot in anatomy.all_slots:
            levels = plans.get(slot.name, [])
            makes = made.get(slot.name, compressor)
            known = {level.name: planned_setting(makes, level, slot.shape[1]) for level in levels}
            settings = {name: setting for name, setting in known.items() if setting is not None}
            self._check_layer(slot.name, settings, config.get_text_config().model_type)
        self._check_drop(drop)

    def _check_layer(self, layer: str, settings: Mapping[str, Setting], family: str) -> None:
        tool = TOOLS[self.format]
        held = [name for name, setting in settings.items() if not tool.refusal(setting, family)]
        for name, setting in settings.items():
            if self._fitted(tool, setting, family) is None:
                fits = f"; of these levels it takes {', '.join(held)}" if held else ""
                raise SettingError(
                    "format",
                    owner=self,
                    got=self.format,
                    allowed=f"a tool that makes {name} of {layer}, or export.nearest=true",
                    hint=f"{tool.NAME}: {tool.refusal(setting, family)}{fits}",
                )

    def _check_drop(self, drop: Drop) -> None:
        if drop.granularity is not None and self.format != "evopress":
            raise SettingError(
                "format",
                owner=self,
                got=self.format,
                allowed=["evopress", ALL],
                hint="no other tool leaves parts of a model out: export=dense writes the smaller model",
            )

    def expected_bytes(self, winner: Winner) -> int:
        """Return about how many bytes the text takes."""
        return 1000 * len(winner.problem.units)

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
        """Write the recipes.

        Args:
            genome: Level of every unit.
            problem: Units and their levels.
            evaluator: Has the model and the levels.
            loaded: The dense model.
            folder: Where to write; replaced if it exists.
            progress: Shows what is written.

        Returns:
            ``path``, ``bytes`` and ``size_mb`` on disk, ``recipes``: names of the tools, ``how_to_load``: the first
            command in one line.

        Raises:
            ExportError: The tool cannot make a level of the allocation.
        """
        winner = Winner(genome, problem, evaluator)
        listing = listing_of(winner, loaded, loaded.name)
        written, refused = self._written(listing)
        (progress or Silent()).say(f"writing {self.contents} to {folder}")
        with new_folder(folder) as temporary:
            for one in written:
                for name, text in one.files.items():
                    write_text(temporary / name, text)
            problem.save(problem.decode(genome), temporary / "allocation.json", problem=problem.fingerprint)
            write_text(temporary / "README.md", _readme(listing, written, refused))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {
            "path": str(folder),
            "bytes": size,
            "size_mb": round(size / 1e6, 3),
            "recipes": [one.tool.NAME for one in written],
            "how_to_load": f"{folder / 'README.md'} has the commands",
        }

    def _written(self, listing: Listing) -> "tuple[list[_Written], dict[str, str]]":
        """Return the recipes, and by tool why it has none.

        Raises:
            ExportError: There is none at all.
        """
        chosen = TOOLS if self.format == ALL else {self.format: TOOLS[self.format]}
        written = []
        refused: dict[str, str] = {}
        for key, tool in chosen.items():
            reason = self._reason(key, tool, listing)
            if reason:
                refused[tool.NAME] = reason
            else:
                written.append(self._recipe(tool, listing))
        if not written:
            raise ExportError(
                f"no recipe can be written: {'; '.join(f'{name}: {text}' for name, text in refused.items())}"
            )
        return written, refused

    def _reason(self, key: str, tool: Tool, listing: Listing) -> str:
        """Return why a tool cannot make an allocation; empty where it can."""
        if listing.drops and key != "evopress":
            return "it leaves no part of a model out"
        for path, setting in listing.layers.items():
            if self._fitted(tool, setting, listing.family) is None:
                return f"{setting.level} of {path}: {tool.refusal(setting, listing.family)}"
        return ""

    def _recipe(self, tool: Tool, listing: Listing) -> "_Written":
        """Return a tool's files, command, and what was changed for it."""
        layers = {path: self._fitted(tool, setting, listing.family) for path, setting in listing.layers.items()}
        taken = {path: setting for path, setting in layers.items() if setting is not None}
        fitting = replace(listing, layers=taken)
        changed = [f"{_commas(paths)}: {old} -> {new}" for (old, new), paths in _changes(listing.layers, taken).items()]
        extra: Callable[[Listing], list[str]] = getattr(tool, "notes", lambda _: [])
        return _Written(tool, tool.files(fitting), tool.command(fitting), [*changed, *extra(fitting)])

    def _fitted(self, tool: Tool, setting: Setting, family: str) -> Setting | None:
        """Return the level as a tool makes it: as it is, or with ``nearest`` its nearest; None if it cannot."""
        refusal = partial(tool.refusal, family=family)
        found = fitted(setting, refusal)
        return found if self.nearest or found is setting else None


@dataclass(frozen=True)
class _Written:
    """A recipe: the tool, its files, the command, and what was changed for the tool."""

    tool: Tool
    files: Mapping[str, str]
    command: str
    changes: list[str] = field(default_factory=list)


def _changes(before: Mapping[str, Setting], after: Mapping[str, Setting]) -> dict[tuple[str, str], list[str]]:
    """Return the layers whose setting changed, by what it was and became."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, setting in before.items():
        if after[path] != setting:
            found.setdefault((str(setting), str(after[path])), []).append(path)
    return found


def _commas(paths: Iterable[str]) -> str:
    first, *rest = paths
    return f"{first} and {len(rest)} more" if rest else first


def _readme(listing: Listing, written: list[_Written], refused: Mapping[str, str]) -> str:
    """Return the page that goes with the recipes: a section a tool, with its command."""
    lines = [f"# Recipes of an allocation for {listing.model}", "", ROUNDS_AGAIN, ""]
    for one in written:
        lines += [f"## {one.tool.NAME}", "", f"Reads {', '.join(f'`{name}`' for name in one.files)}:", ""]
        lines += ["```", one.command, "```", ""]
        if one.changes:
            lines += ["Levels as this tool makes them:", "", *(f"- {text}" for text in one.changes), ""]
    if refused:
        lines += ["## Without a recipe", "", *(f"- {name}: {text}" for name, text in refused.items()), ""]
    return "\n".join(lines)
