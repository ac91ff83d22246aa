from typing import ClassVar

import numpy as np
import pytest

from evosweep.allocators.uniform import Uniform
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import GenerationRecord, SearchStarted, Silent
from evosweep.core.problem import Problem
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.level_codes import allocation_of
from evosweep.samplers.optuna_native import OptunaSampler
from evosweep.samplers.static import AllocatorSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.search.selection_stages import Stage, Stages
from evosweep.search.survival import Outcome
from evosweep.tracking.study.record import StudyRecorder
from evosweep.tracking.study.storage import Journal


class Quadratic:
    """Fitness with a known best genome, and noise that only (generation, stage) decides."""

    def __init__(self, problem: Problem, noise: float = 0.0) -> None:
        self.weights = np.arange(len(problem.units)) % 5 - 2.0
        self.noise = noise
        self.calls: list[tuple[int, int, int, int]] = []

    def true(self, genomes: np.ndarray) -> np.ndarray:
        return 50 + genomes @ self.weights

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        self.calls.append((generation, stage, len(genomes), tokens))
        return self.true(genomes) + self.noise * np.random.default_rng([generation, stage]).normal()

    def validate(self, genome):
        return {"kl": float(self.true(genome[None])[0]), "ppl": 1.0}


class Heard:
    def __init__(self) -> None:
        self.events: list = []

    def on_event(self, event) -> None:
        self.events.append(event)


PLAN = Plan.of(generations=6, stages=[{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}])


def search(problem: Problem, sampler=None, scorer=None, plan: Plan = PLAN, **more):
    sampler = sampler or EvoPressSampler(problem, seed=0, offspring=8)
    scorer = scorer or Quadratic(problem)
    dense = {"kl": 0, "ppl": 1}
    return run_search(name="x", sampler=sampler, scorer=scorer, plan=plan, dense=dense, listeners=[], **more)


def test_stages_thin_out_and_the_parent_competes_in_the_last(problem: Problem) -> None:
    scorer = Quadratic(problem)
    result = search(problem, scorer=scorer)
    distinct = [len({each.genome.tobytes() for each in record.candidates}) for record in result.generations]
    expected = [call for n in range(1, 7) for call in ((n, 0, distinct[n], 10), (n, 1, 4, 100))]
    assert scorer.calls == expected and max(distinct) == 8
    assert result.tokens == sum(count * tokens for _, _, count, tokens in scorer.calls)


def test_the_elite_never_gets_worse_on_noiseless_fitness(problem: Problem) -> None:
    result = search(problem, scorer=Quadratic(problem, noise=100.0))  # common noise cancels on common tokens
    values = [record.validation["kl"] for record in result.generations]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_the_winner_is_what_is_returned(problem: Problem) -> None:
    scorer = Quadratic(problem)
    result = search(problem, scorer=scorer)
    assert result.allocation == result.generations[-1].elite
    assert result.validation["kl"] == scorer.true(problem.encode(result.allocation)[None])[0]
    assert problem.feasible(problem.encode(result.allocation))


def test_same_seed_same_search(problem: Problem) -> None:
    first, second = search(problem), search(problem)
    assert first.allocation == second.allocation
    assert [r.elite.hash for r in first.generations] == [r.elite.hash for r in second.generations]


def test_a_static_allocation_is_validated_without_a_token_of_search(problem: Problem) -> None:
    scorer = Quadratic(problem)
    result = search(problem, sampler=AllocatorSampler(problem, allocator=Uniform()), scorer=scorer)
    assert scorer.calls == [] and result.tokens == 0 and len(result.generations) == 1


def test_listeners_hear_start_and_every_generation(problem: Problem) -> None:
    heard = Heard()
    run_search(
        name="x",
        sampler=EvoPressSampler(problem, seed=0, offspring=4),
        scorer=Quadratic(problem),
        plan=PLAN,
        dense={"kl": 0, "ppl": 1},
        listeners=[heard],
        facts={"a": 1},
    )
    assert isinstance(heard.events[0], SearchStarted) and heard.events[0].facts == {"a": 1}
    records = heard.events[1:]
    assert all(isinstance(record, GenerationRecord) for record in records)
    assert [record.generation for record in records] == list(range(7))
    assert all(len(record.candidates) == 4 for record in records[1:])


class Broken(Quadratic):
    def __init__(self, problem: Problem, broken: slice) -> None:
        super().__init__(problem)
        self.broken = broken

    def score(self, genomes, **place):
        scores = super().score(genomes, **place)
        scores[self.broken] = np.nan
        return scores


def test_scores_that_are_no_numbers_lose_and_are_said(problem: Problem) -> None:
    class Lines(Silent):
        said: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    result = search(problem, scorer=Broken(problem, slice(-1, None)), progress=Lines())
    assert all(np.isfinite(record.validation["kl"]) for record in result.generations)
    assert "NaN" in Lines.said[0] and f"{problem.units[0].name}: " in Lines.said[0]


def test_validation_figures_that_are_nan_end_the_search(problem: Problem) -> None:
    class Unvalidated(Quadratic):
        def validate(self, genome):
            return {**super().validate(genome), "ppl": float("nan")}

    with pytest.raises(EvosweepError, match="generation 0: the elite's validation ppl is NaN; the model overflows"):
        search(problem, scorer=Unvalidated(problem))
    nan = {"kl": 0.0, "ppl": float("nan")}
    with pytest.raises(EvosweepError, match="the dense model's validation ppl is NaN"):
        run_search(
            name="x",
            sampler=EvoPressSampler(problem, seed=0, offspring=8),
            scorer=Quadratic(problem),
            plan=PLAN,
            dense=nan,
            listeners=[],
        )


def test_no_number_at_all_ends_the_search(problem: Problem) -> None:
    with pytest.raises(EvosweepError, match="generation 1: the fitness of all 8 candidates is NaN"):
        search(problem, scorer=Broken(problem, slice(None)))


class GivesUpAtOnce:
    """A survival rule of somebody else's: gives up at once whoever does not survive."""

    def run(self, genomes, *, scorer, survivors: int, **stage):
        scores = scorer.score(genomes, **stage)
        given_up = np.argsort(np.argsort(scores, kind="stable")) >= survivors
        return Outcome(np.where(given_up, -1e9, scores), given_up, 7)  # an estimate may look better than what stayed


def test_who_is_given_up_does_not_survive_and_what_that_saves_is_counted(problem: Problem) -> None:
    stages = [{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}]
    racing = Plan.of(generations=6, stages=stages, racing=GivesUpAtOnce())
    raced, full = search(problem, plan=racing), search(problem)
    assert raced.allocation == full.allocation
    assert raced.tokens == 6 * 2 * 7 and raced.tokens + raced.tokens_saved == full.tokens


def test_a_surrogate_spares_a_share_of_each_later_generation(problem: Problem) -> None:
    stages = [{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}]
    scorer = Quadratic(problem)
    sampler = EvoPressSampler(problem, seed=0, offspring=16)
    result = search(problem, sampler=sampler, scorer=scorer, plan=Plan.of(generations=6, stages=stages, surrogate=0.5))
    distinct = [
        len({genome.tobytes() for genome in sampler.genomes(generation=n + 1, parents=[problem.encode(record.elite)])})
        for n, record in enumerate(result.generations[:-1])
    ]
    firsts = [count for _, stage, count, _ in scorer.calls if stage == 0]
    assert firsts[:2] == distinct[:2] and 16 >= min(distinct) > 10
    assert firsts[2:] == [round(count / 2) for count in distinct[2:]]


ONE = [{"survivors": 1, "tokens": 1}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generations": -1}, r"generations must be"),
        ({"generations": 1.5}, r"generations must be"),
        ({"stages": []}, r"stages must be a list of"),
        ({"stages": None}, r"stages must be a list of"),
        ({"stages": 5}, r"stages must be a list of"),
        ({"stages": {"survivors": 1, "tokens": 1}}, r"stages must be a list of"),
        ({"stages": "abc"}, r"stages must be a list of .* got 'abc'; in a shell, quote"),
        ({"stages": [1, 2]}, r"stages\[0\] must be {survivors: \.\., tokens: \.\.}, got 1; in a shell, quote"),
        ({"stages": [None]}, r"stages\[0\] must be .* got None; in a shell, quote"),
        ({"stages": [*ONE, [1, 64]]}, r"stages\[1\] must be .* got \[1, 64\]; in a shell, quote"),
        ({"stages": ["tokens:64"]}, r"stages\[0\] must be .* got 'tokens:64'; in a shell, quote"),
        ({"stages": [{"survivors": 2, "tokens": 1}]}, "survivors that fall to 1"),
        ({"stages": [*ONE, {"survivors": 2, "tokens": 1}]}, "survivors that fall to 1"),
        ({"stages": [{"survivors": 1}]}, r"stages\[0\] must be"),
        ({"stages": [{"survivors": 1, "tokens": 1, "more": 1}]}, r"stages\[0\] must be"),
        ({"stages": [{"survivors": 1, "tokens": 0}]}, r"stages\[0\]\.tokens must be"),
        ({"stages": [{"survivors": "x", "tokens": 1}]}, r"stages\[0\]\.survivors must be"),
        ({"racing": 2}, "racing must be"),
        ({"racing": "fast"}, "racing must be"),
        ({"surrogate": 1}, "surrogate must be"),
        ({"surrogate": "half"}, "surrogate must be"),
        ({"tokens": 0}, "tokens must be"),
        ({"patience": 0.5}, "patience must be"),
        ({"final": 0}, "final must be true, false or a number of tokens, got 0"),
        ({"final": "yes"}, "final must be"),
        ({"final": None}, "final must be"),
    ],
)
def test_a_bad_plan_is_one_line_that_names_the_argument(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        Plan.of(**{"generations": 1, "stages": ONE, **settings})
    assert "\n" not in str(error.value)
    assert str(error.value.at("search")).startswith("search.")


def test_stages_are_built_in_python_or_from_a_configuration() -> None:
    made = Stages((Stage(survivors=3, tokens=10), Stage(survivors=1, tokens=100)))
    assert Stages.of([{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}]) == made
    assert Stages.of(made) is made and Stages.of(list(made)) == made
    with pytest.raises(SettingError, match="stages must be a list"):
        Stages(())


def test_a_bound_on_tokens_is_kept(problem: Problem) -> None:
    stages = [{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}]
    plan = Plan.of(generations=50, stages=stages, tokens=2000)
    result = search(problem, plan=plan)
    assert result.stopped == "tokens" and 2000 - 480 < result.tokens <= 2000


def test_a_search_that_stands_still_ends(problem: Problem) -> None:
    plan = Plan.of(generations=200, stages=[{"survivors": 1, "tokens": 10}], patience=3)
    result = search(problem, plan=plan)
    assert result.stopped == "stagnation"
    assert [record.changed for record in result.generations[-3:]] == [0, 0, 0] and result.generations[-4].changed


def test_a_genome_proposed_twice_is_scored_once(problem: Problem) -> None:
    class Twins(EvoPressSampler):
        def genomes(self, *, generation, parents):
            genomes = super().genomes(generation=generation, parents=parents)
            return [genome for genome in genomes for _ in range(2 if generation else 1)]

    scorer = Quadratic(problem)
    result = search(problem, sampler=Twins(problem, seed=0, offspring=4), scorer=scorer)
    for record, (_, _, scored, _) in zip(result.generations[1:], scorer.calls[::2], strict=True):
        assert scored == len({each.genome.tobytes() for each in record.candidates}) <= 4
        assert [each.slot for each in record.candidates] == list(range(8))
        for each in record.candidates[1::2]:
            assert each.duplicate_of is not None and each.duplicate_of < each.slot
            assert each.scores == record.candidates[each.duplicate_of].scores


def test_samplers_that_compare_generations_get_the_same_tokens(problem: Problem) -> None:
    scorer = Quadratic(problem)
    search(problem, sampler=OptunaSampler(problem, kind="tpe", offspring=8), scorer=scorer)
    assert {call[0] for call in scorer.calls} == {0}


def several(problem: Problem, count: int = 3, **more) -> EvoPressSampler:
    return EvoPressSampler(problem, seed=0, offspring=8, population_size=count, **more)


def test_several_parents_all_compete_in_the_last_stage(problem: Problem) -> None:
    scorer, heard = Quadratic(problem), Heard()
    result = run_search(
        name="x",
        sampler=several(problem),
        scorer=scorer,
        plan=PLAN,
        dense={"kl": 0, "ppl": 1},
        listeners=[heard],
    )
    last = [size for _, stage, size, _ in scorer.calls if stage == 1]
    assert last[0] == 4 and set(last[2:]) <= {4, 5, 6} and max(last) == 6  # 1 parent and 3, then up to 3 and 3
    records = [event for event in heard.events if isinstance(event, GenerationRecord)]
    parents = [{each.parent for each in record.candidates} for record in records]
    assert len(parents[1]) == 1 and max(map(len, parents)) == 3
    known = {problem.decode(each.genome).hash for record in records for each in record.candidates}
    assert set().union(*parents[1:]) <= known
    values = [record.validation["kl"] for record in result.generations]
    assert values == sorted(values, reverse=True)


def test_several_parents_follow_from_places_alone(problem: Problem) -> None:
    first, second = (search(problem, several(problem)) for _ in range(2))
    assert [record.elite for record in first.generations] == [record.elite for record in second.generations]
    assert search(problem, several(problem, 1)).allocation == search(problem).allocation


def test_a_parent_that_is_the_best_again_is_a_trial(problem: Problem, tmp_path) -> None:
    storage = Journal(path=str(tmp_path / "x.journal")).open()
    recorder = StudyRecorder(storage=storage, name="x")
    plan = Plan.of(generations=40, stages=[{"survivors": 3, "tokens": 10}, {"survivors": 1, "tokens": 100}])

    class Moody(Quadratic):
        """Who is best depends on the generation's tokens."""

        def score(self, genomes, *, generation: int, stage: int, tokens: int):
            noise = np.random.default_rng([generation, stage]).normal(size=genomes.shape[1])
            return self.true(genomes) + genomes @ noise

    result = run_search(
        name="x",
        sampler=several(problem),
        scorer=Moody(problem),
        plan=plan,
        dense={"kl": 0, "ppl": 1},
        listeners=[recorder],
    )
    again = [trial for trial in recorder.study.trials if trial.user_attrs["slot"] == -1]
    assert again, "no parent was ever the best again"
    for trial in again:
        before = recorder.study.trials[trial.user_attrs["duplicate_of"]]
        assert before.user_attrs["levels"] == trial.user_attrs["levels"] and trial.user_attrs["elite"]
    assert allocation_of(recorder.study, recorder.study.trials[recorder.winner]) == result.allocation


def test_the_bar_counts_the_tokens_that_a_search_will_score(problem: Problem) -> None:
    class Watched(Silent):
        expected: ClassVar[list[int | None]] = []
        seen: ClassVar[list[int | None]] = []

        def track(self, items, *, description, tokens=None):
            self.expected.append(tokens)
            return items

        def note(self, values, *, tokens=None):
            self.seen.append(tokens)

    result = search(problem, progress=Watched())
    assert Watched.expected[0] is not None and Watched.seen[-1] == result.generations[-1].tokens
    assert Watched.seen[-1] <= Watched.expected[0] <= 1.3 * Watched.seen[-1]  # copies of parents are not scored again
