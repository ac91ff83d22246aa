"""An Optuna study of two objectives, size and loss, that holds the points of a search's front."""

import optuna
from optuna.trial import TrialState, create_trial

from evosweep.core.events import SearchResult
from evosweep.core.genomes import genome_to_text
from evosweep.samplers import level_codes
from evosweep.samplers.base import unit_distributions
from evosweep.tracking.study.record import aggregates

LOSS = "search_loss"


def write_front(storage: optuna.storages.BaseStorage, name: str, result: SearchResult, *, record: str) -> None:
    """Write the points of a front as complete trials of a study that minimizes size and loss; nothing if it is there.

    Args:
        storage: Where the study is kept.
        name: Of the study.
        result: Of the search.
        record: ``compact``, ``elites`` or ``all``, as for ``StudyRecorder``.
    """
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
    )
    if study.get_trials(deepcopy=False):
        return
    objectives = [result.axis, LOSS]
    study.set_metric_names(objectives)
    problem = result.problem
    for key, value in level_codes.key(problem).items():
        study.set_user_attr(key, value)
    compact, ranges = aggregates(problem)
    trials = []
    for point in result.front:
        genome = problem.encode(point["allocation"])
        trials.append(
            create_trial(
                state=TrialState.COMPLETE,
                values=[float(point[key]) for key in objectives],
                params=compact(genome) if record == "compact" else dict(problem.decode(genome)),
                distributions=ranges if record == "compact" else unit_distributions(problem),
                user_attrs={
                    **{key: point[key] for key in ("point", "bits_per_weight")},
                    **{f"val_{key}": point[key] for key in ("kl", "ppl")},
                    level_codes.LEVELS: genome_to_text(problem, genome),
                },
            )
        )
    study.add_trials(trials)
