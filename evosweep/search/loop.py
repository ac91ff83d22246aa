"""The loop that drives every search: ask for a generation, select from it, record it, notify the listeners."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import (
    Candidate,
    Event,
    FinalRecord,
    GenerationRecord,
    Listener,
    Progress,
    SearchEnded,
    SearchResult,
    SearchStarted,
    Silent,
)
from evosweep.core.problem import Genome
from evosweep.search.final import distinct_elites, score_elites
from evosweep.search.plan import Plan
from evosweep.search.protocols import Sampler, Scorer, Text
from evosweep.search.selection import Selection, Selector
from evosweep.search.state import SearchState
from evosweep.search.survey import run_survey


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
    state: SearchState | None = None,
    state_path: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> SearchResult:
    """Run a search to its end, or continue one; listeners are notified of every generation.

    Args:
        name: Of the run.
        sampler: Proposes generations.
        scorer: Gives losses, fitness and validation figures.
        plan: Generations, stages and strategies.
        dense: The dense model's validation figures, ``kl`` and ``ppl``.
        listeners: Receive every event, in order; the caller sends the last one by ``end_search``.
        facts: What else the listeners should know from the start.
        tokens_spent: Tokens that were scored to prepare this search.
        progress: Shows how far it is.
        state: Where an earlier run of this search stopped; listeners receive its generations first.
        state_path: file that the state is written to after every generation; ``SearchState.read`` reads it.
        identity: What else must be the same for a state to be continued (the store's key, the text's hash ...), a JSON
            object; kept in the state.
        guard: Makes the context in which a generation is scored, written and notified: one that holds back a signal.

    Raises:
        EvosweepError: Fitness or validation figures are NaN, the sampler proposes nothing, or the state is of another
            search.
    """
    _check_figures(dense, "the dense model's")
    problem = sampler.problem
    known = {"sampler": sampler.name, "seed": sampler.seed, **plan.identity, **(identity or {})}
    if state is None:
        state = SearchState(problem=problem, identity=known, tokens_before=tokens_spent)
    state.check(known, problem=problem)
    started = SearchStarted(
        name=name, problem=problem, seed=sampler.seed, facts=facts or {}, continued=state.generation
    )
    _notify(listeners, started, *state.records)
    search = _Search(sampler, scorer, plan, progress or Silent(), state, guard)
    search.catch_up()
    stopped = search.run(listeners, state_path)
    return search.result(dense=dense, stopped=stopped, final=search.final())


def end_search(result: SearchResult, listeners: Sequence[Listener]) -> None:
    """Notify the listeners that a search is over."""
    _notify(listeners, SearchEnded(result=result))


@dataclass
class _Search:
    """A search that is under way: its strategies, and its state so far."""

    sampler: Sampler
    scorer: Scorer
    plan: Plan
    progress: Progress
    state: SearchState
    guard: Callable[[], AbstractContextManager[Any]]
    selector: Selector = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        problem = self.sampler.problem
        screening = self.plan.screening
        self.started = time.monotonic() - self.state.seconds
        self.selector = Selector(
            problem=problem,
            scorer=self.scorer,
            plan=self.plan,
            progress=self.progress,
            surrogate=None if screening is None else screening.start(problem),
            same_tokens=self.sampler.same_tokens,
            parents=self.sampler.population_size,
            order=self.sampler.order if self.sampler.ranks else None,
        )

    def catch_up(self) -> None:
        """Bring sampler and surrogate to where they were when the state was written."""
        remembered = bool(self.state.sampler)  # else all that it proposes follows from the records, and is checked
        if remembered:
            self.sampler.restore(self.state.sampler)
        before: tuple[Any, ...] = ()
        for record in self.state.records:
            if self.selector.surrogate is not None:
                self.selector.surrogate.learn_from(record.candidates)
            if not remembered:
                proposed = self.sampler.population(generation=record.generation, parents=before)
                self._check_proposals(proposed, record)
                self.sampler.learn(record.candidates)
            before = record.parents

    def _check_proposals(self, proposed: Sequence[Candidate], record: GenerationRecord) -> None:
        """Raise EvosweepError where a sampler does not propose what it proposed when the state was written."""
        by_slot = {candidate.slot: candidate.genome for candidate in proposed}
        dropped = self.plan.screening is not None  # candidates that screening dropped are not in the record
        same = (dropped or len(proposed) == len(record.candidates)) and all(
            candidate.slot in by_slot and (by_slot[candidate.slot] == candidate.genome).all()
            for candidate in record.candidates
        )
        if not same:
            raise EvosweepError(
                f"sampler {self.sampler.name} does not propose what this search state holds of generation "
                f"{record.generation}: its settings have changed; set them as they were, or start the search anew"
            )

    def run(self, listeners: Sequence[Listener], state_path: Path | None) -> str:
        """Run the generations that are left.

        Args:
            listeners: Are notified of each.
            state_path: Where the state is written after each; None: nowhere.

        Returns:
            Why it ended: ``finished``, or a stopping rule's reason.
        """
        limit = self.sampler.limit
        end = self.plan.generations + 1 if limit is None else min(self.plan.generations + 1, limit)
        generations = range(self.state.generation, end)
        for generation in self.progress.track(
            generations, description=f"{self.sampler.name}: generations", tokens=self._expected_tokens(generations)
        ):
            reason = self.plan.stopped_by(self.state.records)
            if reason is not None:
                return reason
            with self.guard():
                record = self.step(generation)
                if record is not None:
                    if state_path is not None:  # before the listeners: what one of them cannot write is not lost
                        self.state.save(state_path)
                    _notify(listeners, record)
            if record is None:
                break
            self.progress.note(_figures(record), tokens=record.tokens)
        if not self.state.records:
            raise SettingError("sampler", allowed="one that proposes at least one allocation", got=self.sampler.name)
        return "finished"

    def _expected_tokens(self, generations: range) -> int | None:
        """Return the tokens that will have been scored after these generations; None where none are scored."""
        expected = self.state.tokens
        for generation in generations:
            parents = self.sampler.population_size if generation else 0
            expected += self.plan.stages.tokens_of(self.sampler.size(generation), parents=parents)
            expected += self.sampler.survey_tokens(generation)
        if expected == self.state.tokens:
            return None
        return expected if self.plan.tokens is None else min(expected, self.plan.tokens)

    def step(self, generation: int) -> GenerationRecord | None:
        """Run and record a generation; return None where nothing was proposed."""
        began = time.monotonic()
        parents = self.state.parents
        surveyed = self._survey(generation, parents)
        candidates = self.sampler.population(generation=generation, parents=parents)
        if not candidates:
            return None
        selection = self.selector.run(candidates, parents, generation)
        selection = replace(selection, tokens=selection.tokens + surveyed)
        self.sampler.learn(selection.candidates)
        scored = time.monotonic() - began
        elite = selection.winner.genome
        changed = int((elite != parents[0]).sum()) if parents else 0
        validation = self.state.validation
        if changed or not parents:
            validation = self.scorer.validate(elite)
            _check_figures(validation, f"generation {generation}: the elite's")
        record = self._record(selection, generation, validation=validation, changed=changed, began=began, scored=scored)
        self.state.records.append(record)
        self.state.sampler = self.sampler.state()
        return record

    def _survey(self, generation: int, parents: Sequence[Genome]) -> int:
        """Measure what the sampler wants to know before it proposes; return the tokens that it took."""
        if not self.sampler.surveys:
            return 0
        seq_len = self.scorer.seq_len
        text = Text(windows=self.scorer.final_tokens(None) // seq_len, seq_len=seq_len)
        survey = self.sampler.survey(generation=generation, parents=parents, text=text)
        return 0 if survey is None else run_survey(survey, self.scorer, generation=generation, note=self.progress.say)

    def _record(
        self,
        selection: Selection,
        generation: int,
        *,
        validation: Mapping[str, float],
        changed: int,
        began: float,
        scored: float,
    ) -> GenerationRecord:
        """Return the record of a generation that began at ``began`` and was scored ``scored`` seconds later."""
        problem = self.sampler.problem
        winner = selection.winner
        records = self.state.records
        now = time.monotonic()
        cost = problem.cost(winner.genome)
        return GenerationRecord(
            generation=generation,
            elite=problem.decode(winner.genome) if changed or not records else records[-1].elite,
            elite_slot=winner.slot if winner.slot >= 0 else None,
            cost=cost,
            bits_per_weight=problem.bits_per_weight(cost),
            stages=selection.stages,
            candidates=selection.candidates,
            validation=dict(validation),
            tokens=self.state.tokens + selection.tokens,
            tokens_saved=selection.saved,
            tokens_per_second=selection.tokens / max(scored, 1e-9),
            changed=changed,
            seconds=now - began,
            elapsed=now - self.started,
            facts=self.sampler.facts(),
            parents=selection.parents,
        )

    def final(self) -> FinalRecord | None:
        """Score all elites once more, if the plan says so and there are several."""
        if not self.plan.final:
            return None
        records = self.state.records
        limit = self.plan.final_limit
        elites = len(distinct_elites(records))
        if elites > 1:
            self.progress.say(
                f"the last choice: scoring {elites} elites on {self.scorer.final_tokens(limit):,} tokens each"
            )
        return score_elites(records, problem=self.sampler.problem, scorer=self.scorer, limit=limit)

    def result(self, *, dense: Mapping[str, float], stopped: str, final: FinalRecord | None) -> SearchResult:
        """Return the outcome: the final scoring's winner, or else the last elite."""
        records = self.state.records
        last = next(record.generation for record in records if record.elite == records[-1].elite)
        winner = records[last if final is None else final.winner]
        return SearchResult(
            sampler=self.sampler.name,
            seed=self.sampler.seed,
            allocation=winner.elite,
            problem=self.sampler.problem,
            generations=tuple(records),
            validation=dict(winner.validation),
            dense=dict(dense),
            tokens=self.state.tokens + (0 if final is None else final.spent),
            tokens_saved=sum(record.tokens_saved for record in records),
            seconds=time.monotonic() - self.started,
            stopped=stopped,
            winner_generation=winner.generation,
            final=final,
            candidates_of_front=self._front() if self.sampler.ranks else (),
            axis=self.sampler.axis,
        )

    def _front(self) -> tuple[Genome, ...]:
        """Return the last parents and all elites, none twice."""
        records = self.state.records
        elites = (self.sampler.problem.encode(record.elite) for record in records)
        return tuple({genome.tobytes(): genome for genome in (*records[-1].parents, *elites)}.values())


def _figures(record: GenerationRecord) -> dict[str, str]:
    """Return what a user who watches a search should see of a generation."""
    return {
        "generation": str(record.generation),
        "val KL": f"{record.validation['kl']:.4f}",
        "val PPL": f"{record.validation['ppl']:.2f}",
        "changed": str(record.changed),
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        "tokens": f"{record.tokens:,}",
    }


def _check_figures(figures: Mapping[str, float], whose: str) -> None:
    """Raise EvosweepError where a validation figure is NaN."""
    broken = [name for name, number in figures.items() if math.isnan(number)]
    if broken:
        raise EvosweepError(
            f"{whose} validation {' and '.join(broken)} is NaN; "
            "the model overflows in its number type (try another one), or it or its levels are damaged"
        )


def _notify(listeners: Sequence[Listener], *events: Event) -> None:
    for event in events:
        for listener in listeners:
            listener.on_event(event)
