"""What brackets Hydra's jobs: the comparison at the end of a multirun, and clean folders after bad input."""

import io
import json
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown

from evosweep.core.files import remove_empty_folders, write_json
from evosweep.settings import build
from evosweep.tracking import comparison
from evosweep.tracking.artifacts.compared import FIGURES as compared_figures
from evosweep.tracking.base import TrackingError
from evosweep.tracking.console import COLUMNS, summary, terminal

MULTIRUN = "EVOSWEEP_MULTIRUN"  # environment: name of the multirun that a job belongs to
VARIED = "EVOSWEEP_VARIED"  # environment: JSON list of the settings that the multirun varies
DASHBOARD = "http://127.0.0.1:8080/dashboard"  # where optuna-dashboard listens unless told otherwise
JOB_CONFIG = "config.yaml"  # a job writes it once its settings are checked


class Summary(Callback):
    """Prints and logs one table of all jobs, whoever launched them: each left its ``result.json``."""

    active: ClassVar["Summary | None"] = None

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.folder: Path | None = None
        self.multirun: str | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Remember where a single job writes."""
        self._begin(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Name the multirun, so that its jobs find each other."""
        self._begin(config, config.hydra.sweep.dir)
        os.environ[VARIED] = json.dumps(varied(config))
        self.multirun = os.environ[MULTIRUN] = f"{config.name} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3]

    def end(self, status: str) -> None:
        """Show what there is to compare; where no job got as far as a search, leave nothing behind."""
        if self.config is None or self.folder is None:
            return
        follows = os.environ.get("RANK", "0") != "0"  # one of several processes, of which the first one tells
        results = [] if follows else sorted(self.folder.rglob("result.json"))
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in results]
        table = summary(rows, title=str(self.config.name)) if rows else None
        if table is not None:
            console = terminal()
            console.print(table)
            if len({row["seed"] for row in rows}) > 1:
                console.print(Markdown(comparison.markdown(rows)))
            command = build(self.config, "tracking").command
            for line in how_to_look(self.config, link=rows[0].get("mlflow_link"), command=command):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if not list(self.folder.rglob(JOB_CONFIG)):
            (self.folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's own
            for folder in [*self.folder.glob("*"), self.folder]:
                remove_empty_folders(folder, stop=Path.cwd())
        elif self.multirun is not None and not follows:
            self._log(status, rows, table)
        os.environ.pop(MULTIRUN, None)
        os.environ.pop(VARIED, None)
        Summary.active = None

    def _begin(self, config: DictConfig, folder: str) -> None:
        self.config, self.folder = config, Path(folder)
        Summary.active = self

    def _log(self, status: str, rows: list[dict[str, Any]], table: Any) -> None:
        assert self.config is not None and self.multirun is not None
        columns = [*COLUMNS, "mlflow_run", "dense_ppl"]
        with tempfile.TemporaryDirectory() as folder:
            files = [
                write_json(
                    Path(folder) / "summary.json",
                    {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]},
                )
            ]
            note = ""
            if table is not None:
                compared = {"columns": comparison.COLUMNS, "data": comparison.table(rows)}
                files.append(write_json(Path(folder) / "comparison.json", compared))
                files += [path for draw in compared_figures for path in draw(rows, Path(folder))]
                note = comparison.markdown(rows)
                page = Console(record=True, width=160, file=io.StringIO())
                page.print(table)
                files.append(Path(folder) / "summary.txt")
                files[-1].write_text(page.export_text(), encoding="utf-8")
            tracker = build(self.config, "tracking")
            tracker.summarize(self.multirun, status=status, files=files, note=note)
            if tracker.missing:
                raise TrackingError(tracker.missing)


def varied(config: DictConfig) -> list[str]:
    """Return the full paths of the settings that a multirun gives more than one value."""
    parser = OverridesParser.create()
    params = config.hydra.sweeper.get("params") or {}
    said = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    found = {each.get_key_element().lstrip("+"): each.is_sweep_override() for each in parser.parse_overrides(said)}
    return [key for key, sweeps in found.items() if sweeps]


def how_to_look(config: DictConfig, *, link: str | None, command: str) -> list[str]:
    """Return the commands that open what a run left, and where it is then seen."""
    lines = []
    if link:
        seen = "every run, every generation"
        lines.append(f"{command}   # {seen}: {link}" if command else f"{link}   # {seen}")
    path, artifacts = config.storage.get("path"), config.storage.get("artifacts")
    if path:
        pictures = f" --artifact-dir {artifacts}" if artifacts else ""
        lines.append(f"optuna-dashboard {path}{pictures}   # every candidate: {DASHBOARD}")
    return lines
