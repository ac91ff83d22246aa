"""The only driver of a search: ask a population, score it in stages, keep the best, tell the listeners."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import (
    Candidate,
    GenerationRecord,
    Listener,
    Progress,
    SearchEnded,
    SearchResult,
    SearchStarted,
    Silent,
    StageRecord,
)
from evosweep.core.problem import Genome, Problem
from evosweep.search.racing import Raced, Racing
from evosweep.search.surrogate import MOST, Surrogate


@dataclass(frozen=True)
class Stage:
    """One round of a generation: ``survivors`` of it go on, scored on ``tokens`` tokens each."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """How long a search is and how each generation is thinned out.

    Args:
        generations: Generations after the start.
        stages: Survivors falling to 1.
        racing: When to stop scoring a candidate early; none scores all of a stage on all of its tokens.
        surrogate: Share of a generation that a model of the scores so far drops unscored; none drops nobody.
        tokens: No generation begins that would spend more in all; none sets no bound.
        patience: Generations without a new elite after which the search ends; none never does.

    Raises:
        SettingError: Stages are missing, not falling, or do not end in one survivor.
    """

    generations: int
    stages: tuple[Stage, ...]
    racing: Racing | None = None
    surrogate: float | None = None
    tokens: int | None = None
    patience: int | None = None

    @classmethod
    def of(
        cls,
        *,
        generations: object,
        stages: Any,
        racing: Any = None,
        surrogate: Any = None,
        tokens: Any = None,
        patience: Any = None,
    ) -> "Plan":
        """Validate what the configuration says."""
        count = check_int("search.generations", generations, low=0)
        if not isinstance(stages, Sequence) or not stages:
            raise SettingError("search.stages", allowed="a list of {survivors, tokens}", got=stages)
        made = []
        for place, stage in enumerate(stages):
            if set(stage) != {"survivors", "tokens"}:
                raise SettingError(f"search.stages[{place}]", allowed="{survivors: .., tokens: ..}", got=dict(stage))
            made.append(
                Stage(
                    survivors=check_int(f"search.stages[{place}].survivors", stage["survivors"], low=1),
                    tokens=check_int(f"search.stages[{place}].tokens", stage["tokens"], low=1),
                )
            )
        survivors = [stage.survivors for stage in made]
        if survivors != sorted(survivors, reverse=True) or survivors[-1] != 1:
            raise SettingError("search.stages", allowed="survivors that fall to 1 in the last stage", got=survivors)
        if surrogate is not None:
            check_number("search.surrogate", surrogate, low=0, high=MOST, exclusive=True)
        if tokens is not None:
            check_int("search.tokens", tokens, low=1)
        if patience is not None:
            check_int("search.patience", patience, low=1)
        return cls(count, tuple(made), None if racing is None else Racing(racing), surrogate, tokens, patience)

    def over(self, tokens: int, records: Sequence[GenerationRecord]) -> str | None:
        """Return why a search that has spent ``tokens`` should end here, if it should."""
        if not records:
            return None
        last = records[-1].tokens - records[max(len(records) - 2, 0)].tokens
        if self.tokens is not None and tokens + last > self.tokens:
            return "tokens"
        unchanged = [record.changed == 0 for record in records[1:]]
        if self.patience is not None and len(unchanged) >= self.patience and all(unchanged[-self.patience :]):
            return "stagnation"
        return None


class Scorer(Protocol):
    """Gives candidates their fitness."""

    def score(
        self, genomes: npt.NDArray[np.int64], *, generation: int, stage: int, tokens: int
    ) -> npt.NDArray[np.float64]:
        """Return the fitness of genomes (rows) on the tokens of a place; lower is better."""

    def race(
        self,
        genomes: npt.NDArray[np.int64],
        *,
        generation: int,
        stage: int,
        tokens: int,
        survivors: int,
        racing: Racing,
    ) -> Raced:
        """Return the same of those that stay in the race for the survivors' places, estimates of the others."""

    def validate(self, genome: Genome) -> dict[str, float]:
        """Return ``kl`` and ``ppl`` on the fixed validation set."""


class Sampler(Protocol):
    """Proposes generations."""

    name: str
    seed: int
    problem: Problem
    limit: int | None
    same_tokens: bool
    population_size: int

    def population(self, *, generation: int, parents: Sequence[Genome]) -> list[Candidate]:
        """Return a generation's candidates; none ends the search."""

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Hear what became of them."""

    def facts(self) -> Mapping[str, float]:
        """Return numbers about the sampler itself."""


@dataclass(frozen=True)
class _Selection:
    winner: Candidate
    parents: tuple[Genome, ...]  # of the next generation, the winner first
    candidates: tuple[Candidate, ...]
    stages: tuple[StageRecord, ...]
    tokens: int
    saved: int = 0


def run_search(
    *,
    name: str,
    sampler: Sampler,
    scorer: Scorer,
    plan: Plan,
    dense: Mapping[str, float],
    listeners: Sequence[Listener],
    facts: Mapping[str, Any] | None = None,
    tokens_spent: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Run a search to its end; what every generation did is told as it happens.

    Args:
        name: Of the run.
        sampler: Proposes.
        scorer: Scores.
        plan: Generations and stages.
        dense: The dense model's validation figures.
        listeners: Hear every event, in order; the caller sends the last one, ``SearchEnded``.
        facts: What else the listeners should know from the start.
        tokens_spent: Tokens that were scored to prepare this search.
        progress: Shows how far it is.
    """
    progress = progress or Silent()
    _tell(listeners, SearchStarted(name=name, problem=sampler.problem, seed=sampler.seed, facts=facts or {}))
    search, stopped = _Search(sampler, scorer, plan, progress, tokens=tokens_spent), "finished"
    count = plan.generations + 1 if sampler.limit is None else min(plan.generations + 1, sampler.limit)
    for generation in progress.track(range(count), description=f"{sampler.name}: generations", tokens=plan.tokens):
        reason = plan.over(search.tokens, search.records)
        if reason is not None:
            stopped = reason
            break
        record = search.step(generation)
        if record is None:
            break
        _tell(listeners, record)
        progress.note(_note(record), tokens=record.tokens)
    if not search.records:
        raise SettingError("sampler", allowed="one that proposes at least one allocation", got=sampler.name)
    return SearchResult(
        sampler=sampler.name,
        seed=sampler.seed,
        allocation=search.records[-1].elite,
        problem=sampler.problem,
        generations=tuple(search.records),
        validation=search.validation,
        dense=dict(dense),
        tokens=search.tokens,
        tokens_saved=sum(record.tokens_saved for record in search.records),
        seconds=time.monotonic() - search.started,
        stopped=stopped,
    )


class _Search:
    """Where a search stands: its parents, what was spent, what every generation did."""

    def __init__(self, sampler: Sampler, scorer: Scorer, plan: Plan, progress: Progress, *, tokens: int) -> None:
        self.sampler, self.scorer, self.tokens = sampler, scorer, tokens
        self.started = time.monotonic()
        self.records: list[GenerationRecord] = []
        self.validation: dict[str, float] = {}
        self.parents: tuple[Genome, ...] = ()
        surrogate = None if plan.surrogate is None else Surrogate(sampler.problem, share=plan.surrogate)
        self.arena = _Arena(
            sampler.problem,
            scorer,
            plan,
            progress,
            surrogate,
            same_tokens=sampler.same_tokens,
            parents=sampler.population_size,
        )

    def step(self, generation: int) -> GenerationRecord | None:
        """Run a generation; None where nothing was proposed."""
        began, problem = time.monotonic(), self.sampler.problem
        candidates = self.sampler.population(generation=generation, parents=self.parents)
        if not candidates:
            return None
        selection = self.arena.run(candidates, self.parents, generation)
        self.sampler.learn(selection.candidates)
        scored, elite = time.monotonic() - began, selection.winner.genome
        changed = int((elite != self.parents[0]).sum()) if self.parents else 0
        if changed or not self.parents:
            self.validation = self.scorer.validate(elite)
        self.parents, self.tokens = selection.parents, self.tokens + selection.tokens
        self.records.append(
            GenerationRecord(
                generation=generation,
                elite=problem.decode(elite),
                elite_slot=selection.winner.slot if selection.winner.slot >= 0 else None,
                cost=problem.cost(elite),
                bits_per_weight=problem.bits_per_weight(problem.cost(elite)),
                stages=selection.stages,
                candidates=selection.candidates,
                validation=dict(self.validation),
                tokens=self.tokens,
                tokens_saved=selection.saved,
                tokens_per_second=selection.tokens / max(scored, 1e-9),
                changed=changed,
                seconds=time.monotonic() - began,
                elapsed=time.monotonic() - self.started,
                facts=self.sampler.facts(),
            )
        )
        return self.records[-1]


def _note(record: GenerationRecord) -> dict[str, str]:
    """Return what a user watching a search should see of a generation."""
    return {
        "generation": str(record.generation),
        "val KL": f"{record.validation['kl']:.4f}",
        "val PPL": f"{record.validation['ppl']:.2f}",
        "changed": str(record.changed),
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        "tokens": f"{record.tokens:,}",
    }


def end_search(result: SearchResult, listeners: Sequence[Listener]) -> None:
    """Tell the listeners that a search is over."""
    _tell(listeners, SearchEnded(result=result))


@dataclass(frozen=True)
class _Arena:
    """Where a generation is thinned out."""

    problem: Problem
    scorer: Scorer
    plan: Plan
    progress: Progress
    surrogate: Surrogate | None
    same_tokens: bool
    parents: int

    def run(self, candidates: Sequence[Candidate], parents: Sequence[Genome], generation: int) -> _Selection:
        """Screen a generation, if asked, and thin it out; a genome runs once, its repetitions share what it scored."""
        first: dict[bytes, Candidate] = {}
        for each in candidates:
            first.setdefault(each.genome.tobytes(), each)
        selection = self._screened(list(first.values()), parents, generation)
        ran = {each.slot: each for each in selection.candidates}
        told = []
        for each in candidates:
            original = first[each.genome.tobytes()].slot
            if original in ran:
                scored = ran[original]
                twin = original != each.slot
                told.append(replace(each, scores=scored.scores, duplicate_of=original) if twin else scored)
        return replace(selection, candidates=tuple(told))

    def _screened(self, candidates: Sequence[Candidate], parents: Sequence[Genome], generation: int) -> _Selection:
        if self.surrogate is None:
            return self.select(candidates, parents, generation)
        kept = self.surrogate.promising([each.genome for each in candidates])
        selection = self.select([candidates[place] for place in kept], parents, generation)
        scored = [each for each in selection.candidates if each.scores]
        self.surrogate.learn([each.genome for each in scored], [each.scores[min(each.scores)] for each in scored])
        return selection

    def select(self, candidates: Sequence[Candidate], parents: Sequence[Genome], generation: int) -> _Selection:
        """Thin a generation out, stage by stage; in the last, its parents compete on the same tokens.

        A tie goes to the better parent, then to the lower slot. A single candidate without rival is not scored.
        """
        if len(candidates) == 1 and not parents:
            return _Selection(candidates[0], (candidates[0].genome,), tuple(candidates), (), 0)
        by_slot = {candidate.slot: candidate for candidate in candidates}
        alive, records, tokens, saved = list(candidates), [], 0, 0
        for index, stage in enumerate(self.plan.stages):
            last = index == len(self.plan.stages) - 1
            survivors = max(stage.survivors, self.parents) if last else stage.survivors
            if last:
                known = {parent.tobytes() for parent in parents}
                rivals = [Candidate(slot=-1 - place, genome=parent) for place, parent in enumerate(parents)]
                alive = [*rivals, *(each for each in alive if each.genome.tobytes() not in known)]
            elif len(alive) <= survivors:
                continue  # nobody would be left behind
            raced = self._score(np.stack([each.genome for each in alive]), generation, index, survivors)
            scores = self._numbers(raced.scores, alive, generation)
            tokens, saved = tokens + raced.tokens, saved + stage.tokens * len(alive) - raced.tokens
            records.append(
                StageRecord(
                    scored=len(alive),
                    tokens=stage.tokens,
                    best=float(scores.min()),
                    median=float(np.median(scores)),
                    worst=float(scores.max()),
                    parent=float(scores[0]) if last and parents else None,
                )
            )
            alive = [
                replace(each, scores={**each.scores, index: float(score)})
                for each, score in zip(alive, scores, strict=True)
            ]
            by_slot.update((each.slot, each) for each in alive if each.slot >= 0)
            alive = [alive[place] for place in np.lexsort((scores, raced.out))[:survivors]]
        ordered = tuple(by_slot[slot] for slot in sorted(by_slot))
        best = tuple(each.genome for each in alive if each is alive[0] or np.isfinite(each.scores[index]))
        return _Selection(alive[0], best, ordered, tuple(records), tokens, saved)

    def _score(self, genomes: npt.NDArray[np.int64], generation: int, index: int, survivors: int) -> Raced:
        """Score a stage, as a race or to its end."""
        stage, generation = self.plan.stages[index], 0 if self.same_tokens else generation
        if self.plan.racing is not None:
            return self.scorer.race(
                genomes,
                generation=generation,
                stage=index,
                tokens=stage.tokens,
                survivors=survivors,
                racing=self.plan.racing,
            )
        scores = self.scorer.score(genomes, generation=generation, stage=index, tokens=stage.tokens)
        return Raced(scores, np.zeros(len(genomes), dtype=bool), stage.tokens * len(genomes))

    def _numbers(
        self, scores: npt.NDArray[np.float64], alive: Sequence[Candidate], generation: int
    ) -> npt.NDArray[np.float64]:
        """Return scores, infinite where they are no numbers, and say whose.

        Raises:
            EvosweepError: None is a number.
        """
        broken = np.isnan(scores)
        if broken.all():
            raise EvosweepError(f"generation {generation}: the fitness of all {len(alive)} candidates is NaN")
        for place in map(int, np.flatnonzero(broken)):
            levels = ", ".join(f"{unit}: {level}" for unit, level in self.problem.decode(alive[place].genome).items())
            self.progress.say(f"generation {generation}: a candidate is out, its fitness is NaN: {levels}")
        return np.where(broken, np.inf, scores)


def _tell(listeners: Sequence[Listener], event: Any) -> None:
    for listener in listeners:
        listener.on_event(event)
