"""Settings of the search tuned by a study whose trials are searches; launchers that run jobs side by side."""

import json
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow import MlflowClient
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from evosweep.core.errors import SettingError
from evosweep.core.results import read_result
from evosweep.tracking.study.storage import Journal
from hydra_plugins.evosweep_tuner import distribution
from tests.cli import TINY, evosweep, workplace

SHORT = [*TINY, "search.generations=9", "search.tokens=1500", "search.offspring=choice(2,4)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A corpus and a store's cache that all tests here share."""
    with workplace(tmp_path_factory.mktemp("tuned")) as folder:
        yield folder


def tuned(folder: Path, name: str) -> dict:
    return json.loads(next(folder.glob(f"runs/{name}/*/tuned.json")).read_text())


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    tune = ["+experiment=tune", "hydra.sweeper.trials=3", "seed=0,1", "search.max_flips=range(1,4)"]
    assert evosweep(*tune, *SHORT, "name=once") == 0
    return folder


def study(folder: Path, name: str) -> optuna.Study:
    storage = Journal(path=str(folder / "studies" / f"{name}.journal")).open()
    found = next(each.study_name for each in optuna.get_all_study_summaries(storage) if "tuning" in each.study_name)
    return optuna.load_study(study_name=found, storage=storage)


def test_a_trial_is_a_search_a_seed_and_its_value_their_mean(finished: Path) -> None:
    trials = study(finished, "once").trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    rows = [read_result(path) for path in finished.glob("runs/once/*/*/result.json")]
    by_run = {row["mlflow_run"]: row for row in rows}
    assert len(by_run) == 6
    for trial in trials:
        mine = [by_run[run] for run in trial.user_attrs["runs"]]
        assert {row["seed"] for row in mine} == {0, 1}
        assert trial.value == pytest.approx(sum(row["kl"] for row in mine) / 2)
        assert f"search.max_flips={trial.params['search.max_flips']}" in mine[0]["overrides"]
        assert all(row["history"][-1]["tokens"] <= 1500 for row in mine)  # the final scoring comes on top


def test_the_settings_as_they_are_come_first(finished: Path) -> None:
    first = study(finished, "once").trials[0]
    assert first.user_attrs["settings"] == "as they are"
    assert first.params["search.max_flips"] == 1 and first.params["sampler.cross"] == 0.5
    told = tuned(finished, "once")
    assert told["as_they_are"] == first.value >= told["kl"] == study(finished, "once").best_value
    assert told["settings"] == study(finished, "once").best_params and told["seeds"] == [0, 1]


def test_searches_of_a_tuning_are_children_of_one_run(finished: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("once").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 7 and len(parents) == 1
    assert "search.max_flips=" in parents[0].data.tags["mlflow.note.content"]


def test_the_same_seed_tunes_the_same(finished: Path) -> None:
    tune = ["+experiment=tune", "hydra.sweeper.trials=3", "seed=0,1", "search.max_flips=range(1,4)"]
    assert evosweep(*tune, *SHORT, "name=again", "tracking=none", "storage=memory") == 0
    assert tuned(finished, "again")["settings"] == tuned(finished, "once")["settings"]
    assert tuned(finished, "again")["kl"] == tuned(finished, "once")["kl"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=range(1,5)", IntDistribution(1, 4)),
        ("a=range(2,9,2)", IntDistribution(2, 8, step=2)),
        ("a=range(0.0,1.0,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("a=tag(log,range(1,65))", IntDistribution(1, 64, log=True)),
        ("a=interval(0.0,1.0)", FloatDistribution(0.0, 1.0)),
        ("a=int(interval(1,64))", IntDistribution(1, 64)),
        ("a=tag(log,interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
        ("a=null,0.05,some,'two words'", CategoricalDistribution([None, 0.05, "some", "two words"])),
        ("a=choice(true,false)", CategoricalDistribution([True, False])),
    ],
)
def test_hydra_s_ranges_are_optuna_s_distributions(text: str, expected) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])
    assert distribution(override) == expected


@pytest.mark.parametrize("text", ["a=interval(3,1)", "a=tag(log,interval(0.0,1.0))", "a=range(5,5)"])
def test_a_range_that_is_none_is_told(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])
    with pytest.raises(SettingError, match=r"hydra\.sweeper\.params\.a must be choice"):
        distribution(override)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra.sweeper.trials=0"], "hydra.sweeper.trials must be"),
        (["hydra.sweeper.trials=many"], "hydra.sweeper.trials must be"),
        (["hydra.sweeper.seeds=[]"], "hydra.sweeper.seeds must be a list of different seeds"),
        (["hydra.sweeper.seeds=[0,0]"], "hydra.sweeper.seeds must be a list of different seeds"),
        (["hydra.sweeper.params=null"], "hydra.sweeper.params must be at least one range"),
        (["sampler.crosss=interval(0,1)"], "did you mean"),
        (["sampler.cross=interval(2,5)"], "sampler.cross"),
        (["search.offspring=choice(0,-1)"], "offspring must be"),
        (["sampler=evopres,random"], "did you mean 'evopress'"),
        (["seed=0,x"], "seed must be an integer"),
        (["hydra.sweeper.at_once=0"], "hydra.sweeper.at_once must be"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(folder: Path, capsys, arguments: list[str], said: str) -> None:
    shared = [each for each in TINY if not each.startswith("search.offspring")]
    assert evosweep("+experiment=tune", *shared, "name=bad", "hydra.sweeper.trials=2", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") <= 2
    assert not (folder / "runs" / "bad").exists()


def test_jobs_side_by_side_find_one_parent(folder: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.verbose=0"]
    assert evosweep("-m", *TINY, *launcher, "sampler=uniform,ilp", "seed=0,1", "name=beside", "export=none") == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("beside").experiment_id])
    assert len(runs) == 5 and len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2
    assert {run.info.run_name: run.info.status for run in runs if run.info.status != "FINISHED"} == {}


def test_a_worker_s_bad_input_is_one_line(folder: Path, capsys) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.verbose=0"]
    assert evosweep("-m", *TINY, *launcher, "budget.as_uniform=3,99", "name=worse", "export=none") == 2
    error = capsys.readouterr().err
    assert "budget.as_uniform" in error and "Traceback" not in error
