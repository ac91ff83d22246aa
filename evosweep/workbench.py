"""The model, its text and everything derived from them, which the jobs of a multirun share."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch

from evosweep import parallel
from evosweep.compressors.base import Compressor
from evosweep.core.budget import Budget
from evosweep.core.errors import BudgetError, EvosweepError, ModelError
from evosweep.core.events import Progress, Silent
from evosweep.core.latency import Objective
from evosweep.core.problem import Genome, Problem
from evosweep.core.rules import Ladders, limited
from evosweep.core.unit import Unit, with_columns
from evosweep.data.documents import DocumentSource
from evosweep.data.domains import Domains
from evosweep.data.images import ImageFiles
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.evaluate.continuations import continuations
from evosweep.evaluate.domain_figures import domain_figures
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.tails import Choices, choices, tails, token_figures
from evosweep.evaluate.tasks.accuracy import Accuracy
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.checkpoint import check_length
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel, ModelSource
from evosweep.models.seeing import check_transform, image_processor
from evosweep.models.transforms.base import Transform
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import StorePlan, plan_store
from evosweep.store.units import Units

logger = logging.getLogger(__name__)
FEW_TOKENS = 8  # that the dense model is tried on before any work


@dataclass(frozen=True)
class Materials:
    """The objects that a workbench is made of: model, texts, compressor, transform, drop, store, resources."""

    model: ModelSource
    data: DocumentSource
    tokens: Windows
    compressor: Compressor
    transform: Transform = field(default_factory=Transform)
    drop: Drop = field(default_factory=Drop)
    units: Units = field(default_factory=Units)
    store: StoreBuilder = field(default_factory=StoreBuilder)
    resources: Resources = field(default_factory=Resources)
    domains: Domains = field(default_factory=Domains)
    objective: Objective = field(default_factory=Objective)


class Workbench:
    """The model, its text and everything derived from them, made once, at first use.

    Args:
        loaded: The dense model and its tokenizer.
        splits: Token windows by split.
        compressor: Makes the levels.
        drop: What may be dropped.
        units: What is a unit beside the layers of the blocks.
        store: How the level store is built.
        resources: What scoring may take.
        progress: Shows how far each phase is.
        objective: What levels know beside size and error.
    """

    def __init__(
        self,
        *,
        loaded: LoadedModel,
        splits: Mapping[str, TokenSplit],
        compressor: Compressor,
        drop: Drop | None = None,
        units: Units | None = None,
        store: StoreBuilder | None = None,
        resources: Resources | None = None,
        progress: Progress | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or Objective()
        self.loaded = loaded
        self.splits = dict(splits)
        self.compressor = compressor
        self.drop = drop or Drop()
        self.units = units or Units()
        self.builder = store or StoreBuilder()
        self.resources = resources or Resources()
        self.progress = progress or Silent()
        self.seconds: dict[str, float] = {}
        self._continued: dict[tuple[bytes, tuple[str, ...], int], list[str]] = {}
        self._tails: dict[bytes, dict[str, dict[str, float]]] = {}
        self._on_domains: dict[bytes, dict[str, dict[str, Any]]] = {}
        self._asked: dict[tuple[bytes, str], dict[str, Accuracy]] = {}

    @cached_property
    def anatomy(self) -> Anatomy:
        """The structure of the dense model."""
        warning = check_length(self.loaded.model, max(split.seq_len for split in self.splits.values()))
        anatomy = anatomy_of(self.loaded, self.splits)
        for note in (*anatomy.notes, *([warning] if warning else [])):
            self.progress.say(note)
        return anatomy

    @cached_property
    def plan(self) -> StorePlan:
        """Units, levels and costs before any level is made."""
        return plan_store(self.anatomy, self.compressor, self.drop, self.units)

    @cached_property
    def planned(self) -> tuple[Unit, ...]:
        """Units with the levels that will be made and their costs: ties are one unit, and rules have removed levels."""
        return self._timed(self.units.tied(limited(self.plan.units, self.ladders), self.anatomy))

    @cached_property
    def ladders(self) -> Ladders:
        """Names of the levels that rules leave units, by unit; units that no rule is about are not in it."""
        return self.units.ladders(self.plan.units, self.anatomy)

    @cached_property
    def unlimited(self) -> tuple[Unit, ...]:
        """Units as planned, with all their levels: what a budget may name, whatever the rules are."""
        return self._timed(self.units.tied(self.plan.units, self.anatomy))

    @cached_property
    def units_of_search(self) -> tuple[Unit, ...]:
        """The store's units, tied layers as one unit."""
        return self._timed(self.units.tied(self.store.units, self.anatomy, common=True))

    def _timed(self, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
        """Return the units, each level with its kernel's milliseconds if ``objective.latency`` gives a table."""
        return with_columns(units, self.objective.columns(units))

    @property
    def fixed_bits(self) -> int:
        """Bits of what belongs to no unit."""
        return self.plan.fixed_bits

    @cached_property
    def store(self) -> LevelStore:
        """The level store, found or built, without the levels that rules forbid."""
        with self.timed("store"), parallel.together("store"):
            opened = self.builder.open(
                self.plan, self.splits["calibration"], model_name=self.loaded.name, progress=self.progress
            )
        return opened.limited(self.ladders)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores genomes of the store."""
        return Evaluator(
            anatomy=self.anatomy,
            store=self.store,
            splits=self.splits,
            resources=self.resources,
            units=self.units_of_search,
            shared=True,
        )

    @cached_property
    def dense(self) -> dict[str, float]:
        """Validation figures of the dense model."""
        scorer = StagedScorer(self.evaluator, fitness=KL(), seed=0)
        with self.timed("dense"):
            return scorer.validate(None)

    def kl_by_window(self, genome: Genome) -> list[float]:
        """Return the mean KL of every validation window, in order, for level indices of shape (units,)."""
        return StagedScorer(self.evaluator, fitness=KL(), seed=0).kl_by_window(genome)

    def continuations(self, genome: Genome | None, *, prompts: Sequence[str], tokens: int) -> list[str]:
        """Return the greedy continuation of every prompt, made once for each allocation.

        Args:
            genome: Level indices, shape (units,); None is the dense model.
            prompts: Texts to continue.
            tokens: New tokens at most.
        """
        key = (b"" if genome is None else genome.tobytes(), tuple(prompts), tokens)
        if key not in self._continued:
            tokenizer = self.loaded.tokenizer
            self._continued[key] = continuations(
                self.evaluator, genome, tokenizer=tokenizer, prompts=prompts, tokens=tokens
            )
        return self._continued[key]

    def on_domains(self, genome: Genome | None) -> dict[str, dict[str, Any]]:
        """Return domain -> figures of level indices, shape (units,), or with None of the dense model."""
        key = b"" if genome is None else genome.tobytes()
        if key not in self._on_domains:
            with self.timed("domains"):
                self._on_domains[key] = domain_figures(self.evaluator, genome)
        return self._on_domains[key]

    @cached_property
    def _dense_choices(self) -> Choices:
        return choices(self.evaluator, None)

    def tails(self, genome: Genome) -> dict[str, dict[str, float]]:
        """Return percentiles of KL, flips and RMS shift of level indices, shape (units,), on the validation split."""
        key = genome.tobytes()
        if key not in self._tails:
            with self.timed("tails"):
                self._tails[key] = tails(token_figures(self.evaluator, genome, self._dense_choices))
        return self._tails[key]

    def asked(self, genome: Genome | None, tasks: Tasks) -> dict[str, Accuracy]:
        """Return task -> accuracy of an allocation, measured once for each.

        Args:
            genome: Level indices, shape (units,); None is the dense model.
            tasks: The questions.
        """
        key = (b"" if genome is None else genome.tobytes(), tasks.key)
        if key not in self._asked:
            self._asked[key] = tasks.ask(
                self.evaluator, genome, tokenizer=self.loaded.tokenizer, progress=self.progress
            )
        return self._asked[key]

    def planned_problem(self, budget: Budget) -> Problem:
        """Return the problem as it will be, before any level is made; raises where the budget does not fit."""
        with self._explained():
            return budget.problem(self.planned, fixed_bits=self.fixed_bits, planned=self.unlimited)

    def problem(self, budget: Budget, units: Sequence[Unit] | None = None) -> Problem:
        """Return the problem of the store's levels, or of these units of it, under a budget."""
        made = self.units_of_search if units is None else units
        with self._explained():
            return budget.problem(made, fixed_bits=self.store.fixed_bits, planned=self.unlimited)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to an error about the budget by how much a transform has enlarged the model."""
        try:
            yield
        except BudgetError as error:
            note = self.loaded.size_note
            raise BudgetError(f"{error}; {note}" if note else str(error)) from error

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record the wall-clock seconds of the context in ``seconds[phase]``; nothing is recorded where it raises."""
        began = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - began
        logger.debug("%s: %.1f s", phase, self.seconds[phase])


def anatomy_of(loaded: LoadedModel, splits: Mapping[str, TokenSplit]) -> Anatomy:
    """Return the structure of a model, found on some of the text and with the images that it has."""
    pictures = reduce(or_, (split.pictures for split in splits.values()))
    return Anatomy(loaded.model, torch.from_numpy(splits["search"].windows[:1]), pictures)


def open_bench(materials: Materials, *, progress: Progress) -> Workbench:
    """Load the model, read and tokenize the text, and return the workbench."""
    began = time.monotonic()
    loaded = materials.transform.apply(_loaded(materials.model, progress), progress=progress)
    seconds = {"model": time.monotonic() - began}
    began = time.monotonic()
    images = image_processor(loaded) if isinstance(materials.data, ImageFiles) else None
    splits = materials.tokens.split(
        materials.data, loaded.tokenizer, progress=progress, domains=materials.domains, images=images
    )
    seconds["text"] = time.monotonic() - began
    _check_vocabulary(loaded, splits)
    _check_forward(loaded, splits)
    if images is not None:
        check_transform(materials.transform)
    loaded = materials.transform.calibrate(loaded, torch.from_numpy(splits["calibration"].windows), progress=progress)
    bench = Workbench(
        loaded=loaded,
        splits=splits,
        compressor=materials.compressor,
        drop=materials.drop,
        units=materials.units,
        store=materials.store,
        resources=materials.resources,
        progress=progress,
        objective=materials.objective,
    )
    bench.seconds.update(seconds)
    return bench


def _loaded(source: ModelSource, progress: Progress) -> LoadedModel:
    """Return the model; a library's complaint about its settings is raised as an EvosweepError of one line."""
    try:
        return source.load(progress=progress)
    except (EvosweepError, MemoryError):
        raise
    except Exception as error:
        logger.debug("the model could not be made", exc_info=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"model must be one that can be made with these settings: {lines[-1]}") from error


def _check_vocabulary(loaded: LoadedModel, splits: Mapping[str, TokenSplit]) -> None:
    """Raise ModelError where the tokenizer makes tokens that the model does not know."""
    count = len(loaded.model.get_input_embeddings().weight)  # type: ignore[operator]
    largest = max(int(split.pictures.plain(torch.from_numpy(split.windows)).max()) for split in splits.values())
    if largest >= count:
        raise ModelError(
            f"model has a vocabulary of {count} tokens, but its tokenizer makes token {largest} of the text"
        )


@torch.inference_mode()
def _check_forward(loaded: LoadedModel, splits: Mapping[str, TokenSplit]) -> None:
    """Raise ModelError where the dense model does not run on a few tokens, or gives no numbers."""
    split = splits["search"]
    tokens = torch.from_numpy(split.windows[:1, : None if split.pictures.inputs else FEW_TOKENS])
    try:
        first = next(loaded.model.parameters())
        given = split.pictures.arguments(tokens.to(first.device), dtype=first.dtype)
        logits = loaded.model(**given, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model must be one that runs on text, with these settings it does not: {text}") from error
    if not bool(logits.isfinite().all()):
        raise ModelError("the dense model gives NaN or Inf: try another model.dtype, as model.dtype=float32")
