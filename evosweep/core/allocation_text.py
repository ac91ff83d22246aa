"""Reads, checks and writes allocations in the text format of EvoPress and gptq-gguf-toolkit.

A line a unit or a tied layer, ``model.layers.0.self_attn.q_proj: 3``; the value is one of

- the name of a level, ``3bit``;
- the level's number, ``3`` for 3 bits or ``0.5`` for a sparsity;
- on sparsity ladders a whole number of steps from the uniform level, ``+2`` or ``2`` for two levels sparser, ``-1`` for
  one level denser;
- a ggml type, ``Q2_K`` or as gptq-gguf-toolkit writes it ``2.5625 (2.5625-Q2_K.pth)``: the level of that name, else the
  width that is nearest to the type's.

Or a line a block, in which what is dropped is named: ``attn+mlp``, ``attn``, ``mlp`` or ``none``. Lines that begin with
``#`` are comments. Layers may have their names in GGUF files, ``blk.0.attn_q.weight``; tensors of such a list that are
no units (norms, embeddings) are passed over. A GGUF file is a list of its own types.
"""

from pathlib import Path

import numpy as np

from evosweep.core.allocation import Allocation
from evosweep.core.checks import check_choice
from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.ggml_names import BLOCK, ggml_type, layer_names, level_of_type, read_types
from evosweep.core.problem import Genome, Problem
from evosweep.core.unit import Unit

GGUF = ".gguf"
COMMENT = "#"
DROPS = ("attn+mlp", "attn", "mlp", "none")
STYLES = ("level", "bits", "steps")
Lines = list[tuple[int, str]]  # number in the file, and text, of every line that is not empty


def load_genome(path: Path, problem: Problem) -> Genome:
    """Return the allocation of a file, ``allocation.json``, text or GGUF, as a genome of a problem.

    Raises:
        EvosweepError: The file cannot be read or is no allocation of this problem; the message names file and line.
    """
    if path.suffix == GGUF and path.is_file():
        return _parse_units(_lines_of_gguf(path, problem), problem, str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvosweepError(f"allocation file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvosweepError(f"allocation file {path} is not UTF-8 text") from error
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        allocation = Allocation.load(path)
        try:
            return problem.encode(allocation)
        except EvosweepError as error:
            raise EvosweepError(f"{path}: {error}") from error
    return parse_genome(text, problem, source=str(path))


def parse_genome(text: str, problem: Problem, *, source: str = "allocation") -> Genome:
    """Return the allocation that a text describes, as a genome of a problem.

    Args:
        text: In one of the forms that this module describes.
        problem: Units and ladders.
        source: Name of the text in error messages.

    Raises:
        EvosweepError: A line is none of the forms, or names what the problem does not have.
    """
    every = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in every if line and not line.startswith(COMMENT)]
    if not lines:
        raise EvosweepError(f"{source} is empty: it must hold a line a unit ('unit: level') or a line a block")
    if all(line in DROPS for _, line in lines):
        return _parse_drops(lines, problem, source)
    return _parse_units(_with_layers(lines, problem), problem, source)


def format_genome(genome: Genome, problem: Problem, *, style: str = "level") -> str:
    """Return a genome as text, a line a unit, tied layers with a line each.

    Args:
        genome: Shape (units,).
        problem: Units and ladders.
        style: ``level``: names of levels; ``bits``: their numbers (bits of a width), as EvoPress writes them;
            ``steps``: levels below the uniform one, as EvoPress writes sparsities.

    Raises:
        EvosweepError: A level has no number, or two levels of a unit have the same one.
    """
    check_choice("style", style, STYLES)
    if style == "steps":
        steps = (problem.uniform() - genome).tolist()
        pairs = zip(problem.units, steps, strict=True)
        return "".join(f"{layer.name}: {step}\n" for unit, step in pairs for layer in unit.layers)
    lines = []
    for unit, index in zip(problem.units, genome.tolist(), strict=True):
        value = unit.levels[index].name
        if style == "bits":
            numbers = _numbers(unit)
            if numbers[index] is None or numbers.count(numbers[index]) > 1:
                raise EvosweepError(f"level {value!r} of {unit.name} has no number of its own: write names of levels")
            value = f"{numbers[index]:g}"
        lines += [f"{layer.name}: {value}\n" for layer in unit.layers]
    return "".join(lines)


def format_drops(genome: Genome, problem: Problem) -> str:
    """Return what a genome drops as text, a line a block: ``attn+mlp``, ``attn``, ``mlp`` or ``none``.

    Raises:
        EvosweepError: Some unit is neither a sub-block nor a whole block that can be dropped.
    """
    blocks: dict[int, set[str]] = {}
    for unit, index in zip(problem.units, genome.tolist(), strict=True):
        if not unit.only_drops:
            raise EvosweepError(f"{unit.name} has levels of its own: write a line a unit")
        for block, names in _dropped_names(unit).items():
            blocks.setdefault(block, set())
            if index == 0:
                blocks[block] |= names
    return "".join(f"{'+'.join(sorted(blocks.get(b, ()))) or 'none'}\n" for b in range(max(blocks) + 1))


def _lines_of_gguf(path: Path, problem: Problem) -> Lines:
    """Return a line for every layer of the problem, with its type in a GGUF file."""
    layers = [layer.name for unit in problem.units if not unit.only_drops for layer in unit.layers]
    return list(enumerate((f"{layer}: {kind}" for layer, kind in read_types(path, layers).items()), start=1))


def _with_layers(lines: Lines, problem: Problem) -> Lines:
    """Return the lines of a list of GGUF names with those of layers instead; other lists as they are."""
    if not any(line.startswith(BLOCK) for _, line in lines):
        return lines
    layer_of = layer_names(layer.name for unit in problem.units for layer in unit.layers)
    split = [(number, *line.partition(":")) for number, line in lines]
    return [
        (number, f"{layer_of[name.strip()]}:{value}") for number, name, _, value in split if name.strip() in layer_of
    ]


def _parse_units(lines: Lines, problem: Problem, source: str) -> Genome:
    indices = {unit.name: index for index, unit in enumerate(problem.units)}
    indices |= {layer.name: index for index, unit in enumerate(problem.units) for layer in unit.members}
    named: set[str] = set()
    uniform = problem.uniform()
    genome = np.full(len(problem.units), -1, dtype=np.int64)
    for number, line in lines:
        name, separator, value = (part.strip() for part in line.rpartition(":"))
        if not separator or not name or not value:
            raise EvosweepError(f"{source}:{number}: {line!r} is not 'unit: level'")
        if name not in indices:
            raise EvosweepError(f"{source}:{number}: no unit is called {name!r}{did_you_mean(name, indices)}")
        index = indices[name]
        if name in named:
            raise EvosweepError(f"{source}:{number}: {name} has a level already")
        named.add(name)
        level = _level(problem.units[index], value, uniform=int(uniform[index]))
        if level is None:
            options = ", ".join(problem.units[index].level_names)
            raise EvosweepError(f"{source}:{number}: level of {name} must be one of {options}, got {value!r}")
        if genome[index] not in (-1, level):
            raise EvosweepError(
                f"{source}:{number}: {name} is tied in {problem.units[index].name}, which has another level"
            )
        genome[index] = level
    missing = [unit.name for unit, level in zip(problem.units, genome, strict=True) if level < 0]
    if missing:
        raise EvosweepError(f"{source}: {len(missing)} units have no line ({missing[0]} ...)")
    return genome


def _level(unit: Unit, value: str, *, uniform: int) -> int | None:
    """Return the index of the level that a value names; None if there is none."""
    if value in unit.level_names:
        return unit.level_names.index(value)
    kind = ggml_type(value)
    if kind:
        return level_of_type(unit, kind)
    try:
        number = float(value)
    except ValueError:
        return None
    kinds = {level.nominal.kind for level in unit.levels if level.nominal is not None}
    if kinds == {"sparsity"} and value.lstrip("+-").isdigit():
        level = uniform - int(value)  # a step up is a step sparser, and so cheaper
        return level if 0 <= level < len(unit.levels) else None
    numbers = _numbers(unit)
    return numbers.index(number) if numbers.count(number) == 1 else None


def _numbers(unit: Unit) -> list[float | None]:
    return [None if level.nominal is None else level.nominal.number for level in unit.levels]


def _parse_drops(lines: Lines, problem: Problem, source: str) -> Genome:
    genome = problem.sizes - 1
    droppable = [(index, _dropped_names(unit)) for index, unit in enumerate(problem.units) if unit.levels[0].cost == 0]
    droppable = [(index, names) for index, names in droppable if names]
    covered: set[tuple[int, str]] = set()
    for index, blocks in droppable:
        named = [_named(lines, block, source) for block in blocks]
        wanted = [names <= there for names, there in zip(blocks.values(), named, strict=True)]
        if all(wanted):
            genome[index] = 0
            covered |= {(block, name) for block, names in blocks.items() for name in names}
    for block, (number, line) in enumerate(lines):
        for name in _split(line):
            if (block, name) not in covered:
                raise EvosweepError(f"{source}:{number}: {name} of block {block} cannot be dropped in this problem")
    return genome


def _named(lines: Lines, block: int, source: str) -> set[str]:
    if block >= len(lines):
        raise EvosweepError(f"{source} has {len(lines)} lines, a line a block; the problem has block {block}")
    return _split(lines[block][1])


def _split(line: str) -> set[str]:
    return set() if line == "none" else set(line.split("+"))


def _dropped_names(unit: Unit) -> dict[int, set[str]]:
    """Return what is gone without a unit that can be dropped: ``attn`` and ``mlp`` by block index."""
    if not unit.only_drops:
        return {}
    last = unit.name.rpartition(".")[2]
    blocks = last.split("+")
    if all(block.isdigit() for block in blocks):
        return {int(block): {"attn", "mlp"} for block in blocks}
    return {unit.block: {"attn" if "attn" in last or "attention" in last else "mlp"}}
