"""Hydra callback around a command's jobs: claims their folder, and shows and logs their comparison at the end."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from evosweep.cli.check import check_hydra
from evosweep.cli.folders import CLAIM, claim, release
from evosweep.cli.launch import JOBS, MULTIRUN, VARIED, Launch
from evosweep.cli.launchers import FAILED, ONLY
from evosweep.cli.names import check_name
from evosweep.cli.resume import LAUNCH, earlier_folder, hold, multirun_of, typed, write_launch
from evosweep.core.errors import EvosweepError
from evosweep.core.files import write_text
from evosweep.core.redact import redact

JOB_CONFIG = "config.yaml"  # a job writes it once its settings are checked
HYDRA_FILE = "multirun.yaml"  # Hydra's own


class Refused(BaseException):
    """Carries an error of the user's out of a Hydra callback, where an ``Exception`` would only be logged."""

    def __init__(self, error: EvosweepError) -> None:
        super().__init__(str(error))
        self.error = error


class Summary(Callback):
    """Claims the folder of a run or multirun, and at its end prints and logs one table of its jobs."""

    active: ClassVar["Summary | None"] = None
    finished: ClassVar["Summary | None"] = None

    def __init__(self) -> None:
        self.launch: Launch | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim the folder of a single job."""
        self._begin(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Claim one folder for all jobs, and name the multirun, so that its jobs find each other."""
        launch = self._begin(config, "sweep")
        new = f"{config.get('name')} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3]
        launch.multirun = os.environ[MULTIRUN] = multirun_of(launch.folder) or new
        write_launch(launch.folder, overrides=typed(config), multirun=launch.multirun, finished=False)
        count, varied = _planned(config)
        os.environ[VARIED] = json.dumps(varied)
        if count is not None:
            os.environ[JOBS] = str(count)
        passed_on = {MULTIRUN: launch.multirun, VARIED: json.dumps(varied)}
        passed_on |= {JOBS: os.environ.get(JOBS, "?"), ONLY: os.environ.get(ONLY, "null")}
        with read_write(config), open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={_quoted(str(launch.folder))}")
            for name, value in passed_on.items():  # a launcher's workers may have another, or an earlier, environment
                config.hydra.overrides.hydra.append(f"++hydra.job.env_set.{name}={_quoted(value)}")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Mask passwords in what Hydra wrote about a multirun before its first job."""
        if MULTIRUN in os.environ:
            mask(Path(str(config.hydra.sweep.dir)))

    def end(self, status: str) -> None:
        """Show the comparison and where files are; remove the folders if no job got as far as a search."""
        try:
            if self.launch is None:
                return
            folder = self.launch.folder
            mask(folder)
            for path in folder.glob(".submitit/*/*.pkl"):  # of jobs that are over, with all that was typed
                path.unlink()
            began = [path.parent for path in [*folder.glob(JOB_CONFIG), *folder.glob(f"*/{JOB_CONFIG}")]]
            if not began:
                _leave_nothing(folder)
            elif os.environ.get("RANK", "0") == "0":  # of several processes, the first one reports
                from evosweep.cli.finish import finish  # noqa: PLC0415 - heavy

                finish(self.launch, status, began)
                if self.launch.multirun is not None and status == "FINISHED":
                    command = typed(self.launch.config)
                    write_launch(folder, overrides=command, multirun=self.launch.multirun, finished=True)
        finally:
            os.environ.pop(MULTIRUN, None)
            os.environ.pop(JOBS, None)
            os.environ.pop(VARIED, None)
            Summary.active = None
            Summary.finished = self

    @classmethod
    def place(cls) -> Path | None:
        """Return the folder of the multirun that runs; None for a single run, or where none has begun."""
        launch = None if cls.active is None else cls.active.launch
        return None if launch is None or launch.multirun is None else launch.folder

    def _begin(self, config: DictConfig, mode: str) -> Launch:
        setting = f"hydra.{mode}.dir"
        try:
            check_hydra(config)
            check_name(OmegaConf.select(config, "name"))
            wanted = Path(str(OmegaConf.select(config, setting)))
            earlier = earlier_folder(config, wanted, multirun=mode == "sweep")
            folder = (earlier or claim(wanted, setting=setting)).absolute()
            if earlier is None:
                hold(folder)
        except EvosweepError as error:
            raise Refused(error) from error
        self.launch = Launch(config, folder)
        Summary.active = self
        with read_write(config), open_dict(config):
            config.hydra[mode].dir = str(folder)
        return self.launch

    @classmethod
    def kept(cls) -> str:
        """Return the message that names the allocations that an interrupted command left on disk."""
        summary = cls.finished
        if summary is None or summary.launch is None:
            return "interrupted; nothing was found yet"
        folder = summary.launch.folder
        found = [*folder.glob("allocation.json"), *folder.glob("*/allocation.json")]
        if not found:
            return "interrupted; nothing was found yet"
        where = found[0] if len(found) == 1 else f"{folder}/*/allocation.json"
        again = f"evosweep resume {folder}" if summary.launch.multirun is None else "the same command with resume=auto"
        return f"interrupted; the best allocation so far is kept in {where}; to go on: {again}"


def mask(folder: Path) -> None:
    """Mask the passwords in the file that Hydra writes of a multirun's settings."""
    path = folder / HYDRA_FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if redact(text) != text:
            write_text(path, redact(text))


def _leave_nothing(folder: Path) -> None:
    for name in (HYDRA_FILE, LAUNCH, f".{CLAIM}.lock"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(f"*/{FAILED}"):
        path.unlink()
    release([*(path for path in folder.iterdir() if path.is_dir()), folder])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _planned(config: DictConfig) -> tuple[int | None, list[str]]:
    """Return how many jobs a multirun has, if that is known, and the full paths of the settings that it varies."""
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
        last = {item.get_key_element().lstrip("+"): item.is_sweep_override() for item in overrides}
        varied = [key for key, sweeps in last.items() if sweeps]
        if "trials" in sweeper:
            return int(sweeper.trials) * max(len(sweeper.get("seeds") or []), 1), varied
        return sum(len(batch) for batch in BasicSweeper.split_arguments(overrides, None)), varied
    except Exception:  # Hydra itself reports what is wrong with an override
        return None, []
