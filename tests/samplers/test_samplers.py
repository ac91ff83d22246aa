import pickle

import numpy as np
import optuna
import pytest

from evosweep.allocators.ilp import ILP
from evosweep.allocators.owl import OWL
from evosweep.allocators.uniform import Uniform
from evosweep.core.allocation import Allocation
from evosweep.core.allocation_text import format_genome
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers.base import PopulationSampler, known_value, suggest_allocation
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.samplers.static import AllocatorSampler, SweptAllocatorSampler
from evosweep.search.mutation import Flips
from evosweep.testing import SamplerContract
from evosweep.testing.problems import unfilled_problem

optuna.logging.set_verbosity(optuna.logging.ERROR)


class TestEvoPressSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(problem, seed=seed, offspring=4)

    def test_improves_a_plain_study(self, problem: Problem) -> None:
        study = self._optimize(problem, trials=81)
        assert study.best_value < study.trials[0].value

    def test_beats_random_where_structure_is_to_be_found(self, problem: Problem) -> None:
        values = []
        for kind in (EvoPressSampler, RandomFeasibleSampler):
            study = optuna.create_study(sampler=kind(problem, seed=1, offspring=8))
            study.optimize(self._objective(problem), n_trials=120)
            values.append(study.best_value)
        assert values[0] < values[1]

    def test_a_generation_has_one_parent(self, problem: Problem) -> None:
        study = self._optimize(problem, trials=1 + 4 + 4)
        best = min(study.trials[:5], key=lambda trial: trial.value)
        parent = problem.encode(best.params)
        expected = self.make(problem, 1).genomes(generation=2, parents=[parent])
        assert [tuple(problem.encode(t.params)) for t in study.trials[5:]] == [tuple(genome) for genome in expected]

    def test_maximizing_studies_take_the_highest(self, problem: Problem) -> None:
        study = optuna.create_study(sampler=self.make(problem, 1), direction="maximize")
        study.optimize(self._objective(problem), n_trials=41)
        assert study.best_value > study.trials[0].value

    def test_several_starts_where_uniform_is_not_the_budget(self) -> None:
        sampler = EvoPressSampler(unfilled_problem(), seed=0, offspring=4, start_candidates=6)
        assert sampler.size(0) == 6 == len(sampler.population(generation=0, parents=()))

    def test_generation_and_parent_are_noted(self, problem: Problem) -> None:
        study = self._optimize(problem, trials=9)
        notes = [trial.system_attrs for trial in study.trials]
        assert [note["EvoPressSampler:generation"] for note in notes] == [0] + 4 * [1] + 4 * [2]
        best = min(study.trials[:5], key=lambda trial: trial.value)
        assert {note["EvoPressSampler:parent"] for note in notes[5:]} == {best.number}
        assert study._storage.get_study_system_attrs(study._study_id)["EvoPressSampler:parent:2"] == [best._trial_id]

    @pytest.mark.parametrize("seed", range(4))
    def test_no_trial_that_finishes_late_is_lost(self, problem: Problem, seed: int) -> None:
        """Sixteen workers; whatever has finished by then, in a generation before, the parent is the best of it."""
        study, rng = optuna.create_study(sampler=self.make(problem, seed)), np.random.default_rng(seed)
        running, finished, used = [], [], 0
        for _ in range(300):
            trial = study.ask()
            value = self._objective(problem)(trial)
            parent = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("EvoPressSampler:parent")
            first = trial.number - (trial.number - 1) % 4
            earlier = [(score, number) for score, number in finished if number < first]
            if earlier and trial.number:
                assert parent == min(earlier)[1]
                used += parent + 16 < trial.number
            running.append((trial, value))
            while len(running) >= 16:
                done, score = running.pop(int(rng.integers(len(running))))
                study.tell(done, score)
                finished.append((score, done.number))
        assert used  # parents that finished generations later than their siblings

    def test_a_name_group_swaps_siblings_only(self, problem: Problem) -> None:
        sampler = EvoPressSampler(problem, seed=0, offspring=16, cross=0, group="name", flips="uniform")
        parent = problem.uniform()
        for child in sampler.genomes(generation=1, parents=[parent]):
            moved = np.bincount(problem.kinds, child - parent)
            assert (child != parent).any() and not moved.any()

    @pytest.mark.parametrize(("setting", "value"), [("group", "sise"), ("flips", "min")])
    def test_choices_are_checked(self, problem: Problem, setting: str, value: str) -> None:
        with pytest.raises(SettingError, match=rf"{setting} must be one of"):
            EvoPressSampler(problem, **{setting: value})

    def test_a_repeated_allocation_need_not_be_scored_again(self, problem: Problem) -> None:
        study, scored = optuna.create_study(sampler=AllocatorSampler(problem, allocator=Uniform())), []

        def objective(trial: optuna.Trial) -> float:
            suggest_allocation(trial, problem)
            value = known_value(trial, problem)
            if value is None:
                scored.append(trial.number)
                return 3.0
            return value

        study.optimize(objective, n_trials=3)
        assert scored == [0] and [trial.value for trial in study.trials] == [3.0] * 3
        assert [trial.user_attrs.get("duplicate_of") for trial in study.trials] == [None, 0, 0]

    def test_units_that_leave_no_budget_are_told(self, problem: Problem) -> None:
        study = optuna.create_study(sampler=self.make(problem, 1))
        study.enqueue_trial({unit.name: unit.level_names[-1] for unit in problem.units[:-1]})
        with pytest.raises(EvosweepError, match="11 units that are fixed leave no allocation within the budget"):
            study.optimize(self._objective(problem), n_trials=1)


class TestSeveralParents(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(problem, seed=seed, offspring=4, population_size=3)

    def test_parents_are_the_best_so_far_no_allocation_twice(self, problem: Problem) -> None:
        study = self._optimize(problem, trials=1 + 4 + 4 + 4)
        attributes = study._storage.get_study_system_attrs(study._study_id)
        ids = attributes["EvoPressSampler:parent:3"]
        before = sorted(study.trials[:9], key=lambda trial: (trial.value, trial.number))
        best = list({tuple(sorted(trial.params.items())): trial for trial in reversed(before)}.values())[::-1][:3]
        assert ids == [trial._trial_id for trial in best]
        chosen = {trial.system_attrs["EvoPressSampler:parent"] for trial in study.trials[9:]}
        assert chosen <= {trial.number for trial in best}

    @pytest.mark.parametrize("size", [0, -1, 1.5, "many"])
    def test_how_many_is_a_number(self, problem: Problem, size: object) -> None:
        with pytest.raises(SettingError, match=r"population_size must be an integer"):
            EvoPressSampler(problem, population_size=size)


class TestWarmStartedEvoPressSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(problem, seed=seed, offspring=4, start=ILP())

    def test_it_starts_where_the_allocator_ends_and_needs_its_columns(self, problem: Problem) -> None:
        sampler = self.make(problem, 0)
        [start] = sampler.genomes(generation=0, parents=())
        assert start.tolist() == ILP().allocate(problem).tolist()
        assert tuple(sampler.columns) == ("kl_around_top",) and sampler.name == "evopress+ilp"


class TestEvoPressFromSeveralStarts(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return EvoPressSampler(problem, seed=seed, offspring=4, start=[Uniform(), ILP(), Uniform()])

    def test_generation_0_has_each_start_once(self, problem: Problem) -> None:
        sampler = self.make(problem, 0)
        starts = sampler.genomes(generation=0, parents=())
        wanted = [Uniform().allocate(problem), ILP().allocate(problem)]
        assert [start.tolist() for start in starts] == [genome.tolist() for genome in wanted]
        assert sampler.size(0) == 2 and sampler.name == "evopress+best"


@pytest.mark.parametrize("start", [[], 3, [None]])
def test_a_start_is_a_file_an_allocator_or_a_list_of_such(problem: Problem, start: object) -> None:
    with pytest.raises(SettingError, match=r"start must be null, an allocation.json, an allocator or a list"):
        EvoPressSampler(problem, start=start)  # type: ignore[arg-type]


def test_a_search_starts_from_an_allocation_file(problem: Problem, tmp_path) -> None:
    search = EvoPressSampler(problem, seed=0).search
    genome = search.offspring(generation=1, parents=[problem.uniform()])[0]
    path = problem.decode(genome).save(tmp_path / "allocation.json")
    [start] = EvoPressSampler(problem, seed=0, start=str(path)).genomes(generation=0, parents=())
    assert start.tolist() == genome.tolist()


def test_a_start_that_does_not_fit_is_refused(problem: Problem, tmp_path) -> None:
    path = problem.decode(problem.sizes - 1).save(tmp_path / "allocation.json")
    with pytest.raises(SettingError, match=r"start must be an allocation of at most \d+ bits, got .* with"):
        EvoPressSampler(problem, seed=0, start=path)
    Allocation({problem.units[0].name + "x": "a"}).save(path)
    with pytest.raises(EvosweepError, match=problem.units[0].name):
        EvoPressSampler(problem, seed=0, start=path)
    with pytest.raises(EvosweepError, match="cannot be read"):
        EvoPressSampler(problem, seed=0, start=tmp_path / "none.json")


class TestRandomSampler(SamplerContract):
    def make(self, problem: Problem, seed: int) -> PopulationSampler:
        return RandomFeasibleSampler(problem, seed=seed, offspring=4)


@pytest.mark.parametrize("allocator", [Uniform(), OWL(), ILP()], ids=["uniform", "owl", "ilp"])
class TestAllocatorSampler:
    def test_one_proposal_then_the_end(self, problem: Problem, allocator) -> None:
        sampler = AllocatorSampler(problem, allocator=allocator, seed=0)
        (only,) = sampler.population(generation=0, parents=())
        assert (only.genome == allocator.allocate(problem)).all()
        assert sampler.population(generation=1, parents=[only.genome]) == []

    def test_a_plain_study_repeats_it(self, problem: Problem, allocator) -> None:
        study = optuna.create_study(sampler=AllocatorSampler(problem, allocator=allocator))
        study.optimize(lambda trial: float(len(suggest_allocation(trial, problem))), n_trials=3)
        assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == 1


def test_a_unit_suggested_with_other_choices_is_an_error(problem: Problem) -> None:
    study = optuna.create_study(sampler=EvoPressSampler(problem))
    name = problem.units[0].name
    with pytest.raises((EvosweepError, ValueError)):
        study.optimize(lambda trial: float(trial.suggest_int(name, 0, 3)), n_trials=1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", 1.5), ("seed", "0"), ("offspring", 0), ("max_flips", 0), ("cross", 1.5), ("start_candidates", 0)],
)
def test_bad_settings_are_named(problem: Problem, setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=setting):
        EvoPressSampler(problem, **{setting: value})  # type: ignore[arg-type]


def test_a_swept_allocator_proposes_every_combination(problem: Problem) -> None:
    sampler = SweptAllocatorSampler(problem, allocator=OWL, sweep={"multiple": [5], "spread": [0.0, 0.3, 0.9]})
    genomes = sampler.genomes(generation=0, parents=())
    assert [g.tolist() for g in genomes] == [OWL(spread=each).allocate(problem).tolist() for each in (0.0, 0.3, 0.9)]
    assert sampler.genomes(generation=1, parents=genomes[:1]) == [] and sampler.columns == ("outlier_ratio_m5",)
    with pytest.raises(SettingError, match=r"sweep must be"):
        SweptAllocatorSampler(problem, allocator=OWL, sweep={})


def test_a_search_starts_from_a_published_winner(problem: Problem, tmp_path) -> None:
    genome = EvoPressSampler(problem, seed=0).search.offspring(generation=1, parents=[problem.uniform()])[0]
    path = tmp_path / "winner.txt"
    path.write_text(format_genome(genome, problem, style="bits"))
    [start] = EvoPressSampler(problem, seed=0, start=str(path)).genomes(generation=0, parents=())
    assert start.tolist() == genome.tolist()
    path.write_text(path.read_text().replace("linear_0: ", "linear_0: 1", 1))
    with pytest.raises(EvosweepError, match=r"winner\.txt:1: level of blocks\.0\.linear_0 must be one of"):
        EvoPressSampler(problem, seed=0, start=path)


class Still:
    """A mutation that changes nothing."""

    def __call__(self, problem: Problem, parent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return parent.copy()


def test_a_mutation_can_be_given(problem: Problem) -> None:
    parent = problem.uniform()
    children = EvoPressSampler(problem, offspring=3, mutation=Still()).genomes(generation=1, parents=[parent])
    assert [child.tolist() for child in children] == [parent.tolist()] * 3
    own, flat = (
        EvoPressSampler(problem, offspring=5, mutation=Flips(max_flips=1, cross=0.0)),
        EvoPressSampler(problem, offspring=5, max_flips=1, cross=0.0),
    )
    for first, second in zip(
        own.genomes(generation=1, parents=[parent]), flat.genomes(generation=1, parents=[parent]), strict=True
    ):
        assert first.tolist() == second.tolist()


@pytest.mark.parametrize("value", [None, 5, "ilp"])
def test_an_allocator_is_one(problem: Problem, value: object) -> None:
    with pytest.raises(SettingError, match=r"^allocator must be an allocator"):
        AllocatorSampler(problem, allocator=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"multiple": 3}, r"sweep must be a list of values for each setting of the allocator, got \{'multiple': 3\}"),
        ({"multiple": []}, "sweep must be a list of values"),
        ([3], "sweep must be a list of values"),
        (None, "sweep must be a list of values"),
        ({"typo": [1]}, r"sweep must be of settings that the allocator takes, got 'typo'; it takes multiple, spread"),
        ({"multipel": [3]}, r"did you mean 'multiple'"),
        (
            {"multiple": [4]},
            r"sweep must be values that the allocator takes \(multiple must be one of 3, 5, 7, 10, got 4",
        ),
    ],
)
def test_what_cannot_be_swept_is_said(problem: Problem, sweep: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SweptAllocatorSampler(problem, allocator=OWL, sweep=sweep)  # type: ignore[arg-type]


def test_errors_after_construction_name_their_owner(problem: Problem) -> None:
    units = tuple(Unit(f"u{n}", 10, n, (Level("drop", 0), Level("keep", 160))) for n in range(3))
    allocator = ILP(harm="bare")
    for make in (
        lambda: AllocatorSampler(Problem(units, budget=320), allocator=allocator),
        lambda: EvoPressSampler(Problem(units, budget=320), start=allocator),
    ):
        with pytest.raises(SettingError, match="harm must be") as raised:
            make()
        assert raised.value.owner is allocator


def test_a_generation_is_computed_once_for_all_its_trials(problem: Problem) -> None:
    class Counting(EvoPressSampler):
        calls = 0

        def genomes(self, **arguments):
            self.calls += 1
            return super().genomes(**arguments)

    sampler = Counting(problem, seed=1, offspring=4)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: float(len(suggest_allocation(trial, problem))), n_trials=1 + 3 * 4)
    assert sampler.calls == 4


def test_a_sampler_can_be_sent_to_another_process(problem: Problem) -> None:
    sampler = EvoPressSampler(problem, seed=1, offspring=4)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: float(len(suggest_allocation(trial, problem))), n_trials=3)
    again = pickle.loads(pickle.dumps(sampler))
    parent = problem.uniform()
    first, second = (s.genomes(generation=1, parents=[parent]) for s in (sampler, again))
    assert [genome.tolist() for genome in first] == [genome.tolist() for genome in second]
