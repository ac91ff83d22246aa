"""Hydra sweeper that tunes settings with an Optuna study; every trial is one search for each seed.

Hydra looks for sweepers in ``hydra_plugins``; what is heavy is imported when a sweep begins, as Hydra imports this
module at every start.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import optuna
    from hydra.plugins.launcher import Launcher

VALUE = "kl"  # of a search's result; lower is better
MOST_TRIALS = 10_000


class Tuner(Sweeper):
    """Sweeper that asks a study for settings, runs a search for each seed, and reports their mean validation KL.

    The first trial has the settings as they are, where they lie in the ranges: what is found is measured against it.
    The study is kept with those of its searches (``storage``); ``tuned.json`` in the multirun's folder has the best.

    Args:
        trials: How many, bad ones counted.
        seeds: Seeds of each trial's searches; its value is their mean.
        at_once: Trials asked for before their results are known, for a launcher that runs jobs side by side.
        params: Ranges by setting, in Hydra's words: ``choice(..)``, ``range(..)``, ``interval(..)``,
            ``tag(log, ..)``, ``int(interval(..))``; also fixed values. The command line's come before these.

    Raises:
        SettingError: A number is out of range, nothing has a range, or a range cannot be used.
    """

    def __init__(self, *, trials: int, seeds: list[int], at_once: int = 1, params: Mapping[str, Any] | None) -> None:
        from evosweep.core.checks import check_int  # noqa: PLC0415

        self.trials = check_int("hydra.sweeper.trials", trials, low=1, high=MOST_TRIALS)
        self.at_once = check_int("hydra.sweeper.at_once", at_once, low=1, high=MOST_TRIALS)
        self.seeds = _seeds("hydra.sweeper.seeds", seeds)
        self.params = dict(params or {})
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra passes to every sweeper."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        """Run the study; return the best settings, their value, and the value of the settings as they are."""
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        settings = {item.get_key_element(): item for item in parser.parse_overrides(typed)}  # the last one counts
        if "seed" in settings:
            self.seeds = _seeds("seed", _values(settings.pop("seed")))
        ranges = {key: distribution(item) for key, item in settings.items() if item.is_sweep_override()}
        fixed = [item.input_line for key, item in settings.items() if key not in ranges and item.input_line]
        self.validate_batch_is_legal([[*fixed, *_as_overrides(ranges, _lowest(ranges))]])
        study = self._study(ranges)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        done = 0
        while done < self.trials:
            batch = [study.ask(ranges) for _ in range(min(self.at_once, self.trials - done))]
            succeeded = self._run_batch(study, batch, ranges, fixed, first=done * len(self.seeds))
            done += len(batch)
            if done == len(batch) and not succeeded:
                break  # what is wrong is wrong with all of them, and was reported
        return self._result(study, ranges, folder)

    def _study(self, ranges: Mapping[str, Any]) -> optuna.Study:
        """Return a new study, the settings as they are its first trial."""
        import optuna  # noqa: PLC0415

        from evosweep.cli.compose import build  # noqa: PLC0415
        from evosweep.core.errors import SettingError  # noqa: PLC0415

        config = self.config
        assert config is not None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if not ranges:
            raise SettingError(
                "hydra.sweeper.params", allowed="at least one range, as search.offspring: 'choice(16,64)'", got="none"
            )
        study = optuna.create_study(
            study_name=f"tuning {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3],
            storage=build(config, "storage").open(),
            sampler=optuna.samplers.TPESampler(seed=self.seeds[0], multivariate=True, n_startup_trials=8),
        )
        choices = config.hydra.runtime.choices
        present = {key: choices.get(key, OmegaConf.select(config, key)) for key in ranges}
        with suppress(ValueError):  # they lie outside of the ranges
            optuna.trial.create_trial(value=0.0, params=present, distributions=dict(ranges))
            study.enqueue_trial(present, user_attrs={"settings": "as they are"})
        return study

    def _run_batch(
        self,
        study: optuna.Study,
        batch: Sequence[optuna.Trial],
        ranges: Mapping[str, Any],
        fixed: Sequence[str],
        *,
        first: int,
    ) -> int:
        """Run a batch of trials and give the study their values; return how many succeeded."""
        from optuna.trial import TrialState  # noqa: PLC0415

        assert self.launcher is not None
        jobs = [
            [*fixed, *_as_overrides(ranges, trial.params), f"seed={seed}"] for trial in batch for seed in self.seeds
        ]
        self.validate_batch_is_legal(jobs)
        results = self.launcher.launch(jobs, initial_job_idx=first)
        good = 0
        for index, trial in enumerate(batch):
            own = results[index * len(self.seeds) : (index + 1) * len(self.seeds)]
            rows = [_row(result) for result in own]
            if any(row is None for row in rows):
                study.tell(trial, state=TrialState.FAIL)
                continue
            values = [row[VALUE] for row in rows if row is not None]
            trial.set_user_attr("values", values)
            trial.set_user_attr("runs", [row["mlflow_run"] for row in rows if row is not None])
            study.tell(trial, statistics.fmean(values))
            good += 1
        return good

    def _result(self, study: optuna.Study, ranges: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write and print the best settings, and their value beside that of the first trial."""
        import optuna  # noqa: PLC0415

        from evosweep.core.files import write_json  # noqa: PLC0415
        from evosweep.tracking.console import terminal  # noqa: PLC0415

        complete = [trial for trial in study.trials if trial.value is not None]
        if not complete:
            optuna.delete_study(study_name=study.study_name, storage=study._storage)
            return {}
        best = min(complete, key=lambda trial: (trial.value, trial.number))
        present = next((trial.value for trial in complete if "settings" in trial.user_attrs), None)
        found = {
            "study": study.study_name,
            "settings": best.params,
            VALUE: best.value,
            "as_they_are": present,
            "trials": len(study.trials),
            "complete": len(complete),
            "seeds": self.seeds,
        }
        write_json(folder / "tuned.json", found)
        seeds = f"mean of {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"
        settings = " ".join(_as_overrides(ranges, best.params))
        text = f"best of {len(complete)}: {settings}   val KL {best.value:.4f} ({seeds}"
        text += ")" if present is None else f"; {present:.4f} with the settings as they are)"
        terminal().print(text, highlight=False, markup=False, soft_wrap=True)
        return found


def _seeds(setting: str, seeds: Any) -> list[int]:
    """Return seeds that a mean can be taken over."""
    from evosweep.core.checks import check_int  # noqa: PLC0415
    from evosweep.core.errors import SettingError  # noqa: PLC0415

    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise SettingError(setting, allowed="a list of different seeds", got=seeds)
    return [check_int(setting, seed) for seed in seeds]


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution for a range of Hydra's.

    Raises:
        SettingError: It is no range of numbers or names, or an endless one.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: PLC0415

    from evosweep.core.errors import SettingError  # noqa: PLC0415

    value: Any = override.value()
    log = "log" in (getattr(value, "tags", None) or ())
    try:
        if isinstance(value, IntervalSweep):
            low = value.start or 0
            high = value.end or 0
            step = None
        elif isinstance(value, RangeSweep):
            values = _values(override)
            low = min(values)
            high = max(values)
            step = None if log else abs(value.step)
        else:
            return CategoricalDistribution([_plain(choice) for choice in _values(override)])
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log, step=int(step or 1))
        return FloatDistribution(low, high, log=log, step=step)
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"hydra.sweeper.params.{override.get_key_element()}",
            allowed="choice(..), range(..) or interval(low, high)",
            got=override.input_line,
            hint=str(error),
        ) from error


def _values(override: Override) -> list[Any]:
    """Return the values that an override sweeps over."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _plain(value: Any) -> Any:
    """Return a choice as Optuna keeps it: numbers and names as they are, anything else in Hydra's words."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = getattr(value, "text", None)  # a quoted string
    return text if text is not None else str(value)


def _as_overrides(ranges: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides of Hydra's."""

    def text(value: Any) -> str:
        return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return [f"{key}={text(params[key])}" for key in ranges]


def _lowest(ranges: Mapping[str, Any]) -> dict[str, Any]:
    """Return one value of every range."""
    return {key: span.choices[0] if hasattr(span, "choices") else span.low for key, span in ranges.items()}


def _row(result: JobReturn) -> dict[str, Any] | None:
    """Return the figures of a search; None where it failed of bad input, which the command line reports."""
    from evosweep.core.errors import EvosweepError  # noqa: PLC0415

    try:
        return result.return_value or None
    except EvosweepError:
        return None
