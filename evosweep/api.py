"""The public functions: model -> text -> level store -> problem -> search -> export, without Hydra."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evosweep.compressors.base import Compressor
from evosweep.core.budget import Budget
from evosweep.core.checks import check_choice
from evosweep.core.events import Listener, Progress, SearchResult, Silent
from evosweep.core.problem import Problem
from evosweep.data.documents import DocumentSource
from evosweep.data.images import ImageFiles
from evosweep.data.text import TextFiles
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.scorer import StagedScorer
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.exporters.packed import load as load_packed
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.models.dropping import Drop
from evosweep.models.load import HuggingFace, LoadedModel, ModelSource
from evosweep.models.seeing import image_processor
from evosweep.models.transforms.base import Transform
from evosweep.pipeline import export as export_result
from evosweep.samplers.base import PopulationSampler
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.loop import run_search as drive
from evosweep.search.plan import Plan
from evosweep.store.build import StoreBuilder
from evosweep.store.units import Units
from evosweep.task import Exporter
from evosweep.workbench import Workbench

__all__ = ["build_store", "export", "load", "load_packed", "make_problem", "run_search", "tokenize"]

SHARES = {"validation": 0.06, "search": 0.10, "calibration": 0.84}
STAGES = ({"survivors": 4, "tokens": 512}, {"survivors": 1, "tokens": 2048})
FORMATS: Mapping[str, Callable[[], Exporter]] = {"packed": PackedSafetensors, "dense": DenseSafetensors}


def load(
    model: str | Path | ModelSource,
    *,
    dtype: str = "auto",
    device: str = "auto",
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Return a causal language model with its tokenizer.

    Args:
        model: A model folder, a hub id, or a source such as ``evosweep.models.load.WheelGguf``.
        dtype: Type in which weights are held: ``auto``, ``float32``, ``bfloat16`` or ``float16``; of a folder or hub
            id only.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; of a folder or hub id only.
        transform: Changes weights and keeps logits, as ``Rotate`` does; None: the model stays as it is.
        progress: Shows what is done.

    Raises:
        EvosweepError: It cannot be loaded, or not transformed.
    """
    if isinstance(model, str | Path):
        model = HuggingFace(path=str(model), dtype=dtype, device=device)
    shown = progress or Silent()
    return (transform or Transform()).apply(model.load(progress=shown), progress=shown)


def tokenize(
    text: str | Path | DocumentSource,
    model: LoadedModel,
    *,
    seq_len: int = 512,
    calibration: int = 32768,
    validation: int = 16384,
    shares: Mapping[str, float] = SHARES,
) -> dict[str, TokenSplit]:
    """Return token windows in three splits that share no document.

    Args:
        text: A .txt, .jsonl or .parquet file or a folder of them, or a source of documents (``ImageFiles``: images).
        model: Its tokenizer cuts the text.
        seq_len: Tokens a window.
        calibration: Tokens that compressors see, a multiple of ``seq_len``.
        validation: Tokens that progress is reported on, a multiple of ``seq_len``.
        shares: Share of the text that each split takes.

    Raises:
        EvosweepError: Too little text, or none.
    """
    source = TextFiles(path=str(text)) if isinstance(text, str | Path) else text
    windows = Windows(seq_len=seq_len, calibration=calibration, validation=validation, shares=shares)
    images = image_processor(model) if isinstance(source, ImageFiles) else None
    return windows.split(source, model.tokenizer, images=images)


def build_store(
    model: LoadedModel,
    text: Mapping[str, TokenSplit],
    compressor: Compressor,
    *,
    drop: Drop | None = None,
    units: Units | None = None,
    builder: StoreBuilder | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> Workbench:
    """Return a workbench: the model with its level store, found in the cache or built, and what scores candidates.

    Args:
        model: The dense model.
        text: What ``tokenize`` returned.
        compressor: Makes the levels.
        drop: What may be dropped.
        units: What is a unit beside the layers of the blocks.
        builder: How the store is built.
        resources: Memory and compilation.
        progress: Shows how far it is.

    Raises:
        EvosweepError: A setting does not fit the model, or the store cannot be built.
    """
    bench = Workbench(
        loaded=model,
        splits=text,
        compressor=compressor,
        drop=drop,
        units=units,
        store=builder,
        resources=resources,
        progress=progress,
    )
    bench.progress.say(f"level store of {len(bench.store.units)} units")
    return bench


def make_problem(bench: Workbench, budget: Budget) -> Problem:
    """Return the units of a workbench's store under a budget; raises BudgetError where nothing fits it."""
    return bench.problem(budget)


def run_search(
    problem: Problem,
    bench: Workbench,
    *,
    sampler: PopulationSampler | None = None,
    generations: int = 20,
    stages: Sequence[Mapping[str, int]] = STAGES,
    fitness: Fitness | None = None,
    seed: int = 0,
    listeners: Sequence[Listener] = (),
    **plan: Any,
) -> SearchResult:
    """Search for the allocation with the lowest loss within the problem's budget.

    Args:
        problem: Units, levels, budget.
        bench: Scores candidates.
        sampler: Proposes them; by default EvoPress's evolution with 16 offspring a generation.
        generations: After the start.
        stages: ``survivors`` and ``tokens`` of each selection stage, survivors falling to 1.
        fitness: What is minimized; by default the KL from the dense model.
        seed: Names all randomness.
        listeners: Receive every generation.
        **plan: Further settings of the search (``tokens``, ``patience``, ``racing``, ``surrogate``).

    Raises:
        EvosweepError: A setting does not fit.
    """
    sampler = sampler or EvoPressSampler(problem, seed=seed, offspring=16)
    return drive(
        name=sampler.name,
        sampler=sampler,
        scorer=StagedScorer(bench.evaluator, fitness=fitness or KL(), seed=seed),
        plan=Plan.of(generations=generations, stages=[dict(stage) for stage in stages], **plan),
        dense=bench.dense,
        listeners=listeners,
        progress=bench.progress,
    )


def export(
    result: SearchResult, bench: Workbench, folder: str | Path, *, exporter: Exporter | str = "packed"
) -> dict[str, Any]:
    """Write a search's winner as a model; return its ``path``, ``bytes``, and the code that loads it under ``load``.

    Args:
        result: What was found.
        bench: That it was found on.
        folder: Where to; what is there is replaced.
        exporter: ``packed`` (true size), ``dense`` (plain transformers), or an exporter.

    Raises:
        ExportError: The reloaded model differs from what was scored; it is kept beside the folder then.
    """
    made = FORMATS[check_choice("exporter", exporter, FORMATS)]() if isinstance(exporter, str) else exporter
    made.check(bench.compressor, bench.drop, bench.anatomy, bench.units)
    made.check_problem(result.problem, bench.anatomy, result.problem.encode(result.allocation))
    return export_result(result, bench, made, Path(folder))
