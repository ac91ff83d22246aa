import sqlite3
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard import get_note
from PIL import Image

from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Candidate, GenerationRecord, SearchEnded, SearchResult, SearchStarted
from evosweep.core.genomes import genome_to_text
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.samplers import level_codes
from evosweep.testing.problems import ladder
from evosweep.tracking.artifacts.heatmap import level_image
from evosweep.tracking.study.record import SPANS, StudyRecorder, aggregates
from evosweep.tracking.study.storage import Journal, Memory

optuna.logging.set_verbosity(optuna.logging.ERROR)


def record_of(
    problem: Problem, generation: int, candidates: list[Candidate], winner: int | None, kl: float = 0.5
) -> GenerationRecord:
    elite = candidates[winner or 0].genome
    return GenerationRecord(
        generation=generation,
        elite=problem.decode(elite),
        elite_slot=winner,
        cost=problem.cost(elite),
        bits_per_weight=1.0,
        stages=(),
        candidates=tuple(candidates),
        validation={"kl": kl, "ppl": float("inf")},
        tokens=10,
        tokens_per_second=1.0,
        changed=0,
        seconds=1.0,
        elapsed=1.0,
    )


def search(problem: Problem, folder: Path, record: str = "compact", pictures: bool = False) -> optuna.Study:
    """Record a search of two generations, the second with a better child; return the study as a reader opens it."""
    journal = Journal(
        path=str(folder / "x.journal"), record=record, artifacts=str(folder / "pictures") if pictures else None
    )
    recorder = StudyRecorder(
        storage=journal.open(), name="search", record=journal.record, artifacts=journal.artifact_store()
    )
    recorder.on_event(SearchStarted(name="search", problem=problem, seed=3, facts={"store": "abc"}))
    start, child = problem.uniform(), problem.uniform()
    child[4], child[6] = 2, 0
    records = (
        record_of(problem, 0, [Candidate(0, start)], 0, kl=0.4),
        record_of(problem, 1, [Candidate(0, start, {0: 1.5}), Candidate(1, child, {0: 1.0, 1: 0.9})], 1),
    )
    for record_ in records:
        recorder.on_event(record_)
    result = SearchResult(
        sampler="evopress",
        seed=3,
        allocation=records[-1].elite,
        problem=problem,
        generations=records,
        validation=records[-1].validation,
        dense={"kl": 0.0, "ppl": 5.0},
        tokens=10,
        seconds=1.0,
    )
    recorder.on_event(SearchEnded(result))
    return optuna.load_study(study_name="search", storage=Journal(path=str(folder / "x.journal")).open())


def test_a_generation_can_be_read_back(tmp_path: Path, problem: Problem) -> None:
    study = search(problem, tmp_path)
    assert study.user_attrs["store"] == "abc" and study.user_attrs["problem"] == problem.fingerprint
    first, culled, winner = study.trials[:3]
    assert [t.state for t in study.trials] == [TrialState.PRUNED] * 3 + [TrialState.COMPLETE]
    assert winner.intermediate_values == {0: 1.0, 1: 0.9}
    assert winner.user_attrs["generation"] == 1 and winner.user_attrs["slot"] == 1 and winner.user_attrs["elite"]
    assert "elite" not in culled.user_attrs
    assert culled.params == {} and culled.user_attrs["changed"] == "" and culled.intermediate_values == {0: 1.5}
    names = [problem.units[index].name for index in (4, 6)]
    assert "changed" not in first.user_attrs
    assert winner.user_attrs["changed"] == f"{names[0]}: 3bit to 4bit, {names[1]}: 3bit to 2bit"


def test_the_best_trial_is_the_exported_one_though_another_elite_validated_better(
    tmp_path: Path, problem: Problem
) -> None:
    study = search(problem, tmp_path)
    best = study.best_trial
    assert best.number == 3 and best.value == 0.5 and best.user_attrs["exported"]
    assert best.user_attrs["duplicate_of"] == 2 and study.trials[0].user_attrs["val_kl"] == 0.4
    assert dict(level_codes.allocation_of(study, best)) == study.user_attrs["winner"]
    assert "Validation never selects: generation 0 had a lower validation KL, 0.4000" in get_note(study)


def test_levels_of_elites_can_be_read(tmp_path: Path, problem: Problem) -> None:
    study = search(problem, tmp_path)
    assert study.best_trial.user_attrs["levels_by_layer"] == {
        "linear_0": "3 3 2 3",
        "linear_1": "3 4 3 3",
        "linear_2": "3 3 3 3",
    }


def test_figures_that_json_does_not_have_are_null(tmp_path: Path, problem: Problem) -> None:
    study = search(problem, tmp_path)
    assert study.user_attrs["result"]["ppl"] is None and study.best_trial.user_attrs["val_ppl"] is None
    assert "Infinity" not in (tmp_path / "x.journal").read_text()


def test_every_trial_s_allocation_can_be_read_back(tmp_path: Path, problem: Problem) -> None:
    study = search(problem, tmp_path)
    start, child = problem.uniform(), problem.uniform()
    child[4], child[6] = 2, 0
    found = [level_codes.allocation_of(study, trial) for trial in study.trials]
    assert found == [problem.decode(genome) for genome in (start, start, child, child)]
    other = optuna.create_study()
    other.optimize(lambda trial: 0.0, n_trials=1)
    with pytest.raises(EvosweepError, match="was not recorded with its levels"):
        level_codes.allocation_of(other, other.trials[0])


def test_ladders_longer_than_the_digits_are_read_back() -> None:
    long = tuple(Level(f"s{n}", cost=1000 - n, error=float(n)) for n in range(40))
    short = tuple(Level(f"t{n}", cost=10 - n, error=float(n)) for n in range(3))
    units = (Unit("a", 100, 0, long[::-1]), Unit("b", 10, 0, short[::-1]), Unit("c", 100, 1, long[::-1]))
    problem = Problem(units=units, budget=3000, fixed_bits=0)
    study = optuna.create_study()
    for name, value in level_codes.key(problem).items():
        study.set_user_attr(name, value)
    for genome in (np.array([39, 0, 36]), np.array([0, 2, 9])):
        study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"levels": genome_to_text(problem, genome)}))
        assert level_codes.allocation_of(study, study.trials[-1]) == problem.decode(genome)


def test_elites_have_true_bits_by_depth_and_by_kind(tmp_path: Path, problem: Problem) -> None:
    first, culled, winner, _ = search(problem, tmp_path).trials
    blocks = [name for name in first.params if name.startswith("bits/block ")]
    assert len(blocks) == 4 and set(first.params) - set(blocks) == {f"bits/{unit.kind}" for unit in problem.units}
    for block, name in enumerate(blocks):
        units = [unit for unit in problem.units if unit.block == block]
        mean = sum(unit.levels[1].cost for unit in units) / sum(unit.numel for unit in units)
        assert first.params[name] == pytest.approx(mean)
    assert winner.params[blocks[1]] > first.params[blocks[1]] and winner.params[blocks[2]] < first.params[blocks[2]]
    assert culled.params == {}


@pytest.mark.parametrize(("record", "culled"), [("elites", False), ("all", True)])
def test_whole_allocations_are_parameters_on_request(tmp_path: Path, problem: Problem, record: str, culled) -> None:
    trials = search(problem, tmp_path, record).trials
    assert (problem.encode(trials[0].params) == problem.uniform()).all()
    assert bool(trials[1].params) == culled


def test_deep_models_share_a_parameter_among_neighbours() -> None:
    units = tuple(Unit(f"blocks.{n}.linear", 100, n, ladder(100)) for n in range(126))
    of, ranges = aggregates(Problem(units=units, budget=126 * 319, fixed_bits=0))
    names = [name for name in ranges if name.startswith("bits/block ")]
    assert len(names) == SPANS and names[0] == "bits/block 000-007"
    assert of(np.ones(126, dtype=np.int64))[names[0]] == pytest.approx(3.19)


def test_elites_have_pictures_in_optuna_s_own_store(tmp_path: Path, problem: Problem) -> None:
    study = search(problem, tmp_path, pictures=True)
    first, culled, winner, exported = (
        optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage) for trial in study.trials
    )
    assert [len(each) for each in (first, culled, winner, exported)] == [1, 0, 1, 1]
    assert winner[0].filename == "levels_0001.png" and winner[0].mimetype == "image/png"
    optuna.artifacts.download_artifact(
        artifact_store=optuna.artifacts.FileSystemArtifactStore(str(tmp_path / "pictures")),
        file_path=str(tmp_path / "seen.png"),
        artifact_id=winner[0].artifact_id,
    )
    elite = problem.decode(problem.uniform())
    assert Image.open(tmp_path / "seen.png").size == level_image(problem, elite).shape[1::-1]


@pytest.mark.parametrize("path", ["/proc/nowhere/study.journal", "/"])
def test_a_journal_that_cannot_be_written_is_told(path: str) -> None:
    with pytest.raises(SettingError, match=r"path must be a file that can be written"):
        Journal(path=path).open()


@pytest.mark.parametrize("record", ["everything", None, 3])
def test_what_is_recorded_is_one_of_three(record, tmp_path: Path) -> None:
    for storage in (lambda: Journal(path=str(tmp_path / "x.journal"), record=record), lambda: Memory(record=record)):
        with pytest.raises(SettingError, match=r"record must be one of compact, elites, all"):
            storage()


def test_a_database_of_mlflow_s_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    sqlite3.connect(path).execute("create table runs (id text)")
    with pytest.raises(SettingError, match=r"path must be a journal file.*an SQLite database"):
        Journal(path=str(path))


def test_a_folder_for_pictures_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"artifacts must be a folder that can be written"):
        Journal(path=str(tmp_path / "x.journal"), artifacts="/proc/nowhere").artifact_store()


@pytest.mark.parametrize(
    "torn", ['{"op_code": 4, "wor', '{"op_code": 4, "wor{"op_code": 0, "worker_id": "x"}\n', "\0" * 300000]
)
def test_a_line_that_was_not_written_to_its_end_is_cut_off(tmp_path: Path, problem: Problem, torn: str) -> None:
    study = search(problem, tmp_path)
    path = tmp_path / "x.journal"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn.encode())
    journal = Journal(path=str(path))
    found = optuna.load_study(study_name="search", storage=journal.open())
    assert len(found.trials) == len(study.trials) and path.read_bytes() == whole
    assert journal.repaired == f"{path}: {len(torn)} bytes of a line that was not written to its end were cut off"
    again = Journal(path=str(path))
    again.open()
    assert again.repaired == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "path must be the path of a journal file, got ''"),
        ({"path": 5}, "path must be the path of a journal file, got 5"),
        ({"path": "/dev/null"}, "path must be a file that can be written, got '/dev/null'; that is a device"),
        ({"path": "/tmp"}, "path must be a file that can be written, got '/tmp'; that is a folder"),
        ({"path": "x.journal", "artifacts": 5}, "artifacts must be a folder, or null for no pictures, got 5"),
        ({"path": "x.journal", "artifacts": ""}, "artifacts must be a folder, or null for no pictures, got ''"),
    ],
)
def test_settings_of_a_journal_are_checked_before_anything_is_written(settings, message: str, in_tmp: Path) -> None:
    with pytest.raises(SettingError) as caught:
        Journal(**settings)
    assert str(caught.value) == message and not list(in_tmp.iterdir())


def test_a_full_disk_for_pictures_leaves_the_study_whole(tmp_path: Path, problem: Problem) -> None:
    class Full(optuna.artifacts.FileSystemArtifactStore):
        def write(self, artifact_id: str, content_body) -> None:
            raise OSError(28, "No space left on device")

    recorder = StudyRecorder(storage=Memory().open(), name="s", artifacts=Full(tmp_path))
    recorder.on_event(SearchStarted(name="s", problem=problem, seed=0, facts={}))
    for generation in range(2):
        recorder.on_event(record_of(problem, generation, [Candidate(0, problem.uniform(), {0: 1.0})], 0))
    assert len(recorder.study.trials) == 2
    assert recorder.missing == "the study has no pictures from generation 0 on: OSError: No space left on device"


def test_a_light_recorder_keeps_in_memory_what_no_reader_of_the_file_misses(problem: Problem, tmp_path) -> None:
    journal = Journal(path=str(tmp_path / "x.journal"))
    recorder = StudyRecorder(storage=journal.open(), name="s", light=True)
    recorder.on_event(SearchStarted(name="s", problem=problem, seed=0, facts={}))
    recorder.on_event(record_of(problem, 0, [Candidate(0, problem.uniform(), {0: 1.5})], 0))
    (kept,) = recorder.study.trials
    (written,) = optuna.load_study(study_name="s", storage=journal.open()).trials
    assert kept.user_attrs == {} and kept.intermediate_values == {} and kept.number == 0
    assert written.user_attrs["generation"] == 0 and written.intermediate_values == {0: 1.5}
