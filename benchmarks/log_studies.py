"""Log searches that ran where there is no MLflow: their studies become runs, with one table beside them.

    python benchmarks/log_studies.py studies/quant_3bit.journal [more.journal ...]

One parent run a journal, one child a study, as a multirun here would have left them: what was found after every
generation as metric steps, the result as metrics and params, the winner's allocation.json.
"""

import sys
import tempfile
from pathlib import Path

import optuna

from evosweep.core.allocation import Allocation
from evosweep.core.files import write_json
from evosweep.tracking.mlflow_tracker import MlflowTracker
from evosweep.tracking.study.record import ELITE
from evosweep.tracking.study.storage import Journal

COLUMNS = ("sampler", "seed", "bits_per_weight", "size_mb", "kl", "ppl", "dense_ppl", "tokens", "seconds")
STEPS = {"val_kl": "val/kl", "val_ppl": "val/ppl"}


def log(study: optuna.Study, *, experiment: str, multirun: str, folder: Path) -> list[object]:
    """Log one study; return its row of the table."""
    result = study.user_attrs["result"]
    tracker = MlflowTracker(experiment=experiment)
    shown = {key: result[key] for key in COLUMNS if key in result}
    tracker.start(
        study.study_name,
        params={"sampler": result["sampler"], "seed": str(result["seed"])},
        tags={"study": study.study_name},
        config="",
        multirun=multirun,
    )
    for trial in study.get_trials(deepcopy=False):
        if not trial.user_attrs.get(ELITE):
            continue
        steps = {key: trial.user_attrs[name] for name, key in STEPS.items() if name in trial.user_attrs}
        tracker.metrics(steps, step=trial.user_attrs["generation"])
    tracker.metrics({key: value for key, value in shown.items() if isinstance(value, int | float) and key != "seed"})
    tracker.file(Allocation(study.user_attrs["winner"]).save(folder / "allocation.json"))
    tracker.close("FINISHED")
    return [shown.get(key) for key in COLUMNS]


def main(*paths: str) -> None:
    """Log every study of every journal."""
    for path in map(Path, paths):
        storage, multirun = Journal(path=str(path)).open(), f"{path.stem} from {path.name}"
        names = sorted(summary.study_name for summary in optuna.get_all_study_summaries(storage))
        with tempfile.TemporaryDirectory() as name:
            studies = [optuna.load_study(study_name=each, storage=storage) for each in names]
            done = [study for study in studies if "result" in study.user_attrs]
            rows = [log(each, experiment=path.stem, multirun=multirun, folder=Path(name)) for each in done]
            table = write_json(Path(name) / "summary.json", {"columns": list(COLUMNS), "data": rows})
            MlflowTracker(experiment=path.stem).summarize(multirun, status="FINISHED", files=[table])


if __name__ == "__main__":
    main(*sys.argv[1:])
