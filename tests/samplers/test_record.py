import optuna
import pytest
from optuna.trial import TrialState

from evosweep.core.errors import SettingError
from evosweep.core.events import Candidate, GenerationRecord, SearchStarted
from evosweep.core.problem import Problem
from evosweep.samplers.record import StudyRecorder
from evosweep.samplers.storage import journal

optuna.logging.set_verbosity(optuna.logging.ERROR)


def record_of(problem: Problem, generation: int, candidates: list[Candidate], winner: int | None) -> GenerationRecord:
    elite = candidates[winner or 0].genome
    return GenerationRecord(
        generation=generation, elite=problem.decode(elite), elite_slot=winner, cost=problem.cost(elite),
        bits_per_weight=1.0, stages=(), candidates=tuple(candidates), validation={"kl": 0.5, "ppl": 9.0}, tokens=10,
        tokens_per_second=1.0, changed=0, seconds=1.0, elapsed=1.0,
    )


def test_a_generation_can_be_read_back(tmp_path, problem: Problem) -> None:
    storage = journal(path=str(tmp_path / "studies" / "x.journal"))
    recorder = StudyRecorder(storage=storage, name="search")
    recorder.on_event(SearchStarted(name="search", problem=problem, seed=3, facts={"store": "abc"}))
    start = problem.uniform()
    child = start.copy()
    child[0], child[1] = 2, 0
    recorder.on_event(record_of(problem, 0, [Candidate(0, start)], 0))
    recorder.on_event(record_of(problem, 1, [Candidate(0, start, {0: 1.5}), Candidate(1, child, {0: 1.0, 1: 0.9})], 1))

    study = optuna.load_study(study_name="search", storage=journal(path=str(tmp_path / "studies" / "x.journal")))
    assert study.user_attrs["store"] == "abc" and study.user_attrs["problem"] == problem.fingerprint
    first, culled, winner = study.trials
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert (problem.encode(first.params) == start).all() and (problem.encode(winner.params) == child).all()
    assert winner.value == 0.5 and winner.intermediate_values == {0: 1.0, 1: 0.9}
    assert winner.user_attrs["generation"] == 1 and winner.user_attrs["slot"] == 1
    assert culled.params == {} and culled.user_attrs["changed"] == {} and culled.intermediate_values == {0: 1.5}


def test_what_was_culled_can_be_told_from_its_parent(tmp_path, problem: Problem) -> None:
    recorder = StudyRecorder(storage=journal(path=str(tmp_path / "x.journal")), name="search")
    recorder.on_event(SearchStarted(name="search", problem=problem, seed=3, facts={}))
    start, child = problem.uniform(), problem.uniform()
    child[4], child[6] = 2, 0
    recorder.on_event(record_of(problem, 0, [Candidate(0, start)], 0))
    recorder.on_event(record_of(problem, 1, [Candidate(0, start), Candidate(1, child)], None))
    parent, changed = recorder.study.trials[0].params, recorder.study.trials[2].user_attrs["changed"]
    assert (problem.encode({**parent, **changed}) == child).all()
    assert len(changed) == 2


@pytest.mark.parametrize("path", ["/proc/nowhere/study.journal", "/"])
def test_a_journal_that_cannot_be_written_is_told(path: str) -> None:
    with pytest.raises(SettingError, match=r"storage\.path must be a file that can be written"):
        journal(path=path)
