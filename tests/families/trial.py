"""One family, tried: a small random checkpoint is loaded, compressed, scored, dropped and exported, and all is compared
with the real model's own forward.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.several import Several
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.compressors.uncompressed import NoCompression
from evosweep.core.errors import EvosweepError, ExportError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.data.tokens import TokenSplit
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.dropping import Drop, DropEffect, Droppable, droppables, removed
from evosweep.models.load import HuggingFace, LoadedModel, byte_tokenizer
from evosweep.models.patch import replaced_weights
from evosweep.store.units import Units
from evosweep.workbench import Workbench
from tests.families.configs import CAUSAL, small_config

SEQ_LEN = 24
SPREAD = 0.1  # of what is added to every parameter: biases and gains are then neither 0 nor 1
CLOSE = 1e-5  # of the largest value
EXACT = 1e-6
LARGEST = 30_000_000  # parameters of a small model


@dataclass
class Row:
    """What a trial found of a family.

    Attributes:
        family: Its model type.
        units: Number of units.
        parts: Number of sub-blocks that can be dropped alone.
        covered: Share of the weights of its blocks that units hold.
        whole: Whether it is scored as a whole, as its blocks cannot be run one by one.
        errors: The largest error of each comparison, relative to the largest value.
        refused: Why it was refused, or in part, by step.
        faults: What is wrong, by step: silently, or with an error that is none of ours.
        unbuilt: Why no small model could be made, if none could.
    """

    family: str
    units: int = 0
    parts: int = 0
    covered: float = 0.0
    whole: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    unbuilt: str = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Keep what a step raises: refusals apart from faults."""
        try:
            yield
        except ExportError as error:  # too late: what cannot be exported is refused before any work
            self.faults[name] = str(error)[:120]
        except EvosweepError as error:
            self.refused[name] = str(error)
            if "\n" in str(error):
                self.faults[name] = "the message has more than one line"
        except Exception as error:  # whatever it is, it is a fault of ours
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:200]
            self.faults[name] = f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"

    def compare(self, name: str, found: torch.Tensor, expected: torch.Tensor, *, bound: float = CLOSE) -> None:
        """Keep the largest difference of two tensors as an error, and as a fault where it is above a bound.

        Args:
            name: Of the comparison.
            found: Ours.
            expected: The real model's.
            bound: Of the largest expected value.
        """
        scale = max(float(expected.abs().max()), 1e-9)
        error = float((found.double() - expected.double()).abs().max()) / scale
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        if not error <= bound:
            self.faults.setdefault(name, f"differs by {error:.2g} of the largest value")

    @property
    def green(self) -> bool:
        """Whether nothing is wrong: what is not right was refused."""
        return not self.faults and not self.unbuilt


def try_family(kind: str, folder: Path, *, loader: str = CAUSAL, thorough: bool = True) -> Row:
    """Return what a trial of a family finds.

    Args:
        kind: Its model type.
        folder: An empty folder for its checkpoint and exports.
        loader: Name of the class of transformers that makes the model.
        thorough: Whether the model is exported without each of its blocks, not without the second alone.
    """
    row = Row(kind)
    try:
        make_checkpoint(kind, folder / "dense", loader=loader)
    except Exception as error:  # of transformers: the family cannot be built small
        row.unbuilt = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return row
    with row.step("load"):
        loaded = HuggingFace(path=str(folder / "dense"), dtype="float32", device="cpu").load(progress=Silent())
        drop = Drop(granularity="sublayers")
        with row.step("sub-blocks"):
            row.parts = len(drop.options(_bench(loaded, _compressor(), drop).anatomy))
        bench = _bench(loaded, _compressor(), Drop() if "sub-blocks" in row.refused else drop)
        row.covered = bench.plan.coverage.share
        row.whole = bool(bench.anatomy.whole_because)
    if "load" in row.refused or row.faults:
        return row
    with row.step("chain"):
        _check_chain(row, bench)
    with row.step("store"):
        row.units = len(bench.store.units) - len(bench.store.drops)
    if "store" not in row.refused and "store" not in row.faults:
        with row.step("scored"):
            _check_scores(row, bench, folder)
    if "sub-blocks" not in row.refused:
        with row.step("dropped"):
            _check_gone(row, bench)
    with row.step("blocks"):
        _check_blocks(row, loaded, folder, thorough=thorough)
    return row


def make_checkpoint(kind: str, folder: Path, *, loader: str = CAUSAL) -> None:
    """Save a random model of a family with a tokenizer of one token a byte.

    Args:
        kind: Its model type.
        folder: Where to.
        loader: Name of the class of transformers that makes the model.
    """
    torch.manual_seed(0)
    config = small_config(kind)
    maker: Any = getattr(transformers, loader)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in maker.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters, as parts beside the blocks do not follow the config's sizes")
    model: Any = maker.from_config(config, dtype=torch.float32).eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=SPREAD)
    model.tie_weights()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _compressor() -> Several:
    return Several(parts={"quantized": GPTQ(bits=[2, 4], group=4), "sparse": SparseGPT(patterns=["2:4"])})


def _bench(loaded: LoadedModel, compressor: Any, drop: Drop) -> Workbench:
    rng = np.random.default_rng(0)
    counts = {"calibration": 6, "search": 3, "validation": 2}
    splits = {name: TokenSplit(name, rng.integers(2, 256, (count, SEQ_LEN)), (name,)) for name, count in counts.items()}
    return Workbench(loaded=loaded, splits=splits, compressor=compressor, drop=drop, units=Units(coverage=0.0))


@torch.no_grad()
def _check_chain(row: Row, bench: Workbench) -> None:
    """Compare the model run as scoring runs it with the model itself, on different windows at once."""
    windows = bench.splits["search"].windows
    tokens = torch.from_numpy(windows)
    expected = _token_losses(bench.loaded.model, tokens)
    found = bench.evaluator.token_losses(None, split="search", windows=range(len(windows)), fitness=[Perplexity()])
    row.compare("chain", torch.from_numpy(found["ppl"][0]), expected)


def _check_scores(row: Row, bench: Workbench, folder: Path) -> None:
    """Compare scores of a population with each genome's weights in the real model, then export one genome."""
    genomes = _genomes(bench)
    windows = bench.splits["search"].windows
    found = bench.evaluator.token_losses(genomes, split="search", windows=range(len(windows)), fitness=[Perplexity()])
    for genome, losses in zip(genomes, found["ppl"], strict=True):
        with swapped(bench, genome):
            expected = _token_losses(bench.loaded.model, torch.from_numpy(windows))
        row.compare("scored", torch.from_numpy(losses), expected)
    for name, exporter in {"dense": DenseSafetensors(), "packed": PackedSafetensors()}.items():
        with row.step(name):
            _check_export(row, bench, genomes[-1], name, exporter, folder / name)


def _genomes(bench: Workbench) -> np.ndarray:
    """Return genomes: all at one level, random levels, and random ones with a sub-block dropped; kept where gated."""
    units = bench.store.units
    rng = np.random.default_rng(1)
    rows = []
    for dropped in (0.0, 0.0, 0.0, 0.3, 0.3):
        rows.append(
            [
                int(rng.random() >= dropped) if index in bench.store.drops else rng.integers(len(unit.levels))
                for index, unit in enumerate(units)
            ]
        )
    return np.array(rows, dtype=np.int64)


@contextmanager
def swapped(bench: Workbench, genome: np.ndarray) -> Iterator[None]:
    """Give the real model a genome's weights, and take away what it drops, while the context lasts."""
    units = bench.store.units
    indices = {unit.name: index for index, unit in enumerate(units)}
    slots = [slot for slot in bench.anatomy.slots if slot.name in indices]
    weights = {
        slot.name: bench.evaluator.weight(indices[slot.name], int(genome[indices[slot.name]])).clone() for slot in slots
    }
    gone = [effect for index, effect in bench.store.drops.items() if genome[index] == 0]
    with replaced_weights(slots, weights), taken_away(bench, gone):
        yield


@contextmanager
def taken_away(bench: Workbench, effects: Sequence[DropEffect]) -> Iterator[None]:
    """Take away what is dropped with plain hooks: a sub-block's output is zero, a block returns its input."""
    model = bench.loaded.model
    with ExitStack() as stack:
        for effect in effects:
            if effect.writer is not None:
                module = model.get_submodule(effect.writer)
                stack.callback(module.register_forward_hook(_zero).remove)
            for block in effect.blocks if effect.whole else ():
                module = bench.anatomy.blocks[block]
                stack.callback(module.register_forward_hook(_pass_by, with_kwargs=True).remove)
        yield


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    del module, args
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _pass_by(module: nn.Module, args: Any, keywords: Mapping[str, Any], output: Any) -> Any:
    del module
    given = args[0] if args else keywords["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@torch.no_grad()
def _token_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)


def _check_export(row: Row, bench: Workbench, genome: np.ndarray, name: str, exporter: Any, folder: Path) -> None:
    """Export a genome, reload it, and compare its losses with those of the real model with swapped weights.

    Args:
        row: Filled.
        bench: The model and its levels.
        genome: The levels.
        name: Of the comparison.
        exporter: Writes the model.
        folder: Where to.
    """
    units = bench.store.units
    problem = Problem(
        units=units, budget=sum(unit.levels[-1].cost for unit in units), fixed_bits=bench.store.fixed_bits
    )
    exporter.check(bench.compressor, bench.drop, bench.anatomy, bench.units)
    exporter.check_problem(problem, bench.anatomy, genome)
    exporter.export(genome, problem=problem, evaluator=bench.evaluator, loaded=bench.loaded, folder=folder)
    tokens = torch.from_numpy(bench.splits["validation"].windows)
    reloaded = exporter.reload(folder, dtype=torch.float32).eval()
    with swapped(bench, genome):
        expected = _token_losses(bench.loaded.model, tokens)
    row.compare(name, _token_losses(reloaded, tokens), expected)


def _check_gone(row: Row, bench: Workbench) -> None:
    """Scramble the weights that are counted as gone, for every sub-block alone, and see the same logits."""
    tokens = torch.from_numpy(bench.splits["validation"].windows)
    for option in droppables(bench.anatomy, "sublayers"):
        with taken_away(bench, [option.effect]):
            expected = _logits(bench, tokens)
            with scrambled(option):
                found = _logits(bench, tokens)
        row.compare("dropped", found, expected, bound=EXACT)
        with removed(bench.anatomy, [option.effect]):
            row.compare("removed", _logits(bench, tokens), expected)


@contextmanager
def scrambled(option: Droppable) -> Iterator[None]:
    """Add noise to all parameters that are counted as gone while the context lasts."""
    draws = torch.Generator().manual_seed(1)
    before = [parameter.detach().clone() for parameter in option.parameters]
    with torch.no_grad():
        for parameter in option.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draws))
        try:
            yield
        finally:
            for parameter, values in zip(option.parameters, before, strict=True):
                parameter.copy_(values)


@torch.no_grad()
def _logits(bench: Workbench, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = bench.loaded.model(input_ids=tokens, use_cache=False).logits
    return logits


def _check_blocks(row: Row, loaded: LoadedModel, folder: Path, *, thorough: bool) -> None:
    """Drop each block alone: the score is that of the real model without it, and so is what is exported.

    Args:
        row: Filled.
        loaded: The model.
        folder: For the exports.
        thorough: As for ``try_family``.
    """
    bench = _bench(loaded, NoCompression(), Drop(granularity="blocks"))
    genomes = 1 - np.eye(len(bench.store.units), dtype=np.int64)
    windows = bench.splits["search"].windows
    found = bench.evaluator.token_losses(genomes, split="search", windows=range(len(windows)), fitness=[Perplexity()])
    for genome, losses in zip(genomes, found["ppl"], strict=True):
        with swapped(bench, genome):
            expected = _token_losses(loaded.model, torch.from_numpy(windows))
        row.compare("blocks", torch.from_numpy(losses), expected)
    with row.step("without blocks"):
        DenseSafetensors().check(bench.compressor, bench.drop, bench.anatomy, bench.units)
        for block in range(len(genomes)) if thorough else (1,):
            genome = genomes[block]
            _check_export(row, bench, genome, "without blocks", DenseSafetensors(), folder / f"block{block}")
