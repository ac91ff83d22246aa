"""What brackets Hydra's jobs: a folder of their own, the comparison at the end, and clean folders after bad input."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from evosweep.cli.check import check_hydra
from evosweep.cli.folders import claim, release
from evosweep.cli.names import check_name
from evosweep.core.errors import EvosweepError
from evosweep.core.results import RESULT

MULTIRUN = "EVOSWEEP_MULTIRUN"  # environment: name of the multirun that a job belongs to
JOBS = "EVOSWEEP_JOBS"  # environment: how many jobs it has
VARIED = "EVOSWEEP_VARIED"  # environment: JSON list of the settings that the multirun varies
JOB_CONFIG = "config.yaml"  # a job writes it once its settings are checked


class Refused(BaseException):
    """Carries an error of the user's out of a callback: Hydra only warns of an ``Exception`` there, and goes on."""

    def __init__(self, error: EvosweepError) -> None:
        super().__init__(str(error))
        self.error = error


class Summary(Callback):
    """Gives a run or multirun its folder; in the end shows and logs one table of its jobs, whoever launched them."""

    active: ClassVar["Summary | None"] = None
    finished: ClassVar["Summary | None"] = None

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.folder: Path | None = None
        self.multirun: str | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the folder of a single job."""
        self._begin(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim one folder for all jobs, and name the multirun, so that its jobs find each other."""
        self._begin(config, "sweep")
        self.multirun = os.environ[MULTIRUN] = f"{config.get('name')} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3]
        count, varied = _planned(config)
        os.environ[VARIED] = json.dumps(varied)
        if count is not None:
            os.environ[JOBS] = str(count)
        with read_write(config), open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={_quoted(str(self.folder))}")

    def jobs(self) -> list[Path]:
        """Return the folders of the jobs that have a result, in the order of their numbers."""
        if self.folder is None:
            return []
        if self.multirun is None:
            return [self.folder] if (self.folder / RESULT).is_file() else []
        found = [path.parent for path in self.folder.glob(f"*/{RESULT}")]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def end(self, status: str) -> None:
        """Show what there is to compare and where it lies; where no job got as far as a search, leave nothing."""
        try:
            if self.folder is None:
                return
            began = [path.parent for path in [*self.folder.glob(JOB_CONFIG), *self.folder.glob(f"*/{JOB_CONFIG}")]]
            if not began:
                self._leave_nothing()
            elif os.environ.get("RANK", "0") == "0":  # of several processes, the first one tells
                from evosweep.cli.finish import finish  # noqa: PLC0415 - heavy

                finish(self, status, began)
        finally:
            os.environ.pop(MULTIRUN, None)
            os.environ.pop(JOBS, None)
            os.environ.pop(VARIED, None)
            Summary.active = None
            Summary.finished = self

    def _leave_nothing(self) -> None:
        assert self.folder is not None
        (self.folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's own
        release([*(path for path in self.folder.iterdir() if path.is_dir()), self.folder])

    def _begin(self, config: DictConfig, mode: str) -> None:
        setting = f"hydra.{mode}.dir"
        try:
            check_hydra(config)
            check_name(OmegaConf.select(config, "name"))
            self.folder = claim(Path(str(OmegaConf.select(config, setting))), setting=setting).absolute()
        except EvosweepError as error:
            raise Refused(error) from error
        self.config = config
        Summary.active = self
        with read_write(config), open_dict(config):
            config.hydra[mode].dir = str(self.folder)

    @classmethod
    def kept(cls) -> str:
        """Return what an interrupted command has kept, as it is on disk."""
        summary = cls.finished
        folder = None if summary is None else summary.folder
        if folder is None:
            return "interrupted; nothing was found yet"
        found = [*folder.glob("allocation.json"), *folder.glob("*/allocation.json")]
        if not found:
            return "interrupted; nothing was found yet"
        where = found[0] if len(found) == 1 else f"{folder}/*/allocation.json"
        return f"interrupted; the best allocation so far is kept in {where}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _planned(config: DictConfig) -> tuple[int | None, list[str]]:
    """Return how many jobs a multirun has, if its sweeper tells, and the full paths of the settings that it varies."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # noqa: PLC0415
    from hydra.core.global_hydra import GlobalHydra  # noqa: PLC0415
    from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: PLC0415

    sweeper = config.hydra.sweeper
    try:
        main = GlobalHydra.instance().hydra
        assert main is not None
        parser = OverridesParser.create(config_loader=main.config_loader)
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        overrides = parser.parse_overrides([*params, *config.hydra.overrides.task])
        last = {each.get_key_element().lstrip("+"): each.is_sweep_override() for each in overrides}
        varied = [key for key, sweeps in last.items() if sweeps]
        if "trials" in sweeper:
            return int(sweeper.trials) * max(len(sweeper.get("seeds") or []), 1), varied
        return sum(len(batch) for batch in BasicSweeper.split_arguments(overrides, None)), varied
    except Exception:  # what is wrong with an override is told by Hydra itself
        return None, []
