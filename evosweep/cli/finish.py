"""The end of a command: exports winners, prints the table of jobs, where files are and how to open them."""

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from evosweep.cli.compose import build
from evosweep.cli.launch import Launch
from evosweep.cli.reopen import export_earlier, reopen
from evosweep.core.errors import EvosweepError
from evosweep.core.files import write_json
from evosweep.core.redact import redact
from evosweep.core.results import RESULT, read_result
from evosweep.core.run_record import several_of
from evosweep.evaluate.tails import SHARES
from evosweep.pipeline import CONFIG, MODEL
from evosweep.tracking import comparison
from evosweep.tracking.artifacts.compared import FIGURES as compared_figures
from evosweep.tracking.base import TrackingError
from evosweep.tracking.console import COLUMNS, domain_table, summary, terminal
from evosweep.tracking.report import FOLDER as REPORT
from evosweep.tracking.significance import against_uniform, found_sentences

DASHBOARD = "http://127.0.0.1:8080/dashboard"  # optuna-dashboard's default address
SELECTION = "kl and ppl are measured on validation text, which never selects: winners were chosen on search tokens"
SAMPLE = 160  # characters shown of a continuation; the report has all
Row = Mapping[str, Any]


def finish(run: Launch, status: str, began: Sequence[Path]) -> None:
    """Export a multirun's winners, print the table of its jobs and where files are, and close its parent run.

    Args:
        run: The job or multirun.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        began: Folders of the jobs that began.
    """
    folders = run.jobs()
    rows = [read_result(folder / RESULT) for folder in folders]
    if run.multirun is None:
        run = replace(run, multirun=several_of(run.folder).get("multirun"))
    table = summary(rows, title=str(run.config.name)) if rows else None
    console = terminal()
    try:
        if run.multirun is not None and status != "KILLED":
            _export_winners(run.config, folders, rows, only=several_of(run.folder).get("winner"))
            rows = [read_result(folder / RESULT) for folder in folders]
    finally:
        if table is not None:
            console.print(table)
            if len({(row["seed"], row.get(comparison.CALIBRATION)) for row in rows}) > 1:
                for line in standings(rows):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
            best = rows[best_jobs(rows)[0]]
            if best.get("domains"):
                console.print(domain_table(best["domains"], name=best["run"]))
            for line in [
                *reference(rows),
                *verdicts(rows),
                *tail_lines(rows),
                *task_lines(rows),
                *samples(rows),
                SELECTION,
                *export_lines(folders, rows),
                *viewer_commands(run.config, link=_link(rows), studies=studies_of(began)),
            ]:
                console.print(redact(line), highlight=False, markup=False, soft_wrap=True)
        if run.multirun is not None:
            _log(run, status, began, rows, table)


def standings(rows: Sequence[Row]) -> list[str]:
    """Return one line for every entry of the comparison: means over seeds, and how it stands to the best."""
    found = [dict(zip(comparison.COLUMNS, line, strict=True)) for line in comparison.table(rows)]
    return [
        f"{line['budget']} {line['sampler']}: kl {line['kl']:.4f}"
        + (f" ± {line['kl_sd']:.4f}" if line["kl_sd"] is not None else "")
        + f" over {line['seeds']} seeds{_noise(line)}, {line['verdict']}"
        for line in found
    ]


def _noise(line: Mapping[str, Any]) -> str:
    """Return how much of the spread is the search's and how much calibration's, where there are several of these."""
    if line["kl_sd_calibration"] is None:
        return ""
    search = "" if line["kl_sd_search"] is None else f"search sd {line['kl_sd_search']:.4f}, "
    return f" ({search}calibration sd {line['kl_sd_calibration']:.4f})"


def _export_winners(main: DictConfig, folders: Sequence[Path], rows: Sequence[Row], *, only: str | None = None) -> None:
    """Export the best job of every budget, where its settings ask for that.

    Args:
        main: Settings of the command.
        folders: Of the jobs.
        rows: Their results.
        only: Name of the one folder whose winner was looked for; None: of every budget.
    """
    for index in best_jobs(rows):
        if only is not None and folders[index].name != only:
            continue
        config = OmegaConf.load(folders[index] / CONFIG)
        assert isinstance(config, DictConfig)
        if config.export.get("enabled") and not rows[index].get("export"):
            config.tracking = _tracking(main, config).tracking
            export_earlier(reopen(folders[index], config), target=folders[index] / MODEL)


def best_jobs(rows: Sequence[Row]) -> list[int]:
    """Return the index of the best job of every budget: lowest loss on the search tokens that all jobs share.

    Validation has no part in it, so that its figures say how good the chosen one is.
    """
    best: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        key = (row["budget"], row["selected_by"], row["text"])
        if key not in best or row["search_loss"] < rows[best[key]]["search_loss"]:
            best[key] = index
    return list(best.values())


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return for every budget whether its best job beats the uniform allocation and its own start, a sentence each."""
    sentences = []
    for index in best_jobs(rows):
        row = rows[index]
        with_sizes = against_uniform(rows, row)
        against = {key: value for key, value in row.get("against", {}).items() if key != "uniform" or not with_sizes}
        sentences += [*([with_sizes] if with_sizes else []), *found_sentences(row["sampler"], against)]
    return sentences


def reference(rows: Sequence[Row]) -> list[str]:
    """Return what the dense model is, where it was dequantized from a file of its own."""
    source = rows[0].get("source") if rows else None
    if not source:
        return []
    return [
        f"dense is {source['name']} ({source['size_mb']:.1f} MB) dequantized to 16 bits, not the original checkpoint; "
        "embeddings and head stay at 16 bits here, so that file is hard to beat in size"
    ]


def samples(rows: Sequence[Row]) -> list[str]:
    """Return how dense model, uniform allocation and the best job continue the prompts, a line each."""
    if not rows or not rows[0].get("continuations"):
        return []
    lines = []
    for prompt, answers in rows[best_jobs(rows)[0]]["continuations"].items():
        lines.append(f"» {prompt}")
        lines += [f"   {name}: {' '.join(text.split())[:SAMPLE]}" for name, text in answers.items()]
    return lines


def tail_lines(rows: Sequence[Row]) -> list[str]:
    """Return how the best job and the uniform allocation treat single tokens, a line each."""
    tails = rows[best_jobs(rows)[0]].get("tails") if rows else None
    if not tails:
        return []
    lines = ["tokens whose likeliest successor changes; KL of the median, 90th, 99th, 99.9th percentile; RMS shift"]
    for name, figures in tails.items():
        parts = [spread(figures["flips"], scale=100, digits=1, unit=" %")]
        parts += [spread(figures[key], digits=3) for key in SHARES]
        parts.append(spread(figures["rms_shift"], digits=3))
        lines.append(f"   {name}: {', '.join(parts)}")
    if "low" in next(iter(tails.values()))["flips"]:
        return [*lines, "   in brackets 95 % intervals of a bootstrap over windows"]
    return [*lines, "   one validation window has no interval: raise tokens.validation to two windows or more"]


def spread(figures: Mapping[str, float], *, digits: int, scale: float = 1, unit: str = "") -> str:
    """Return a figure with its interval, if it has one.

    Args:
        figures: ``value``, and ``low`` and ``high``.
        digits: After the point.
        scale: What the figures are multiplied by.
        unit: Written behind the value.
    """
    value, *ends = (f"{scale * number:.{digits}f}" for number in figures.values())
    return f"{value}{unit}" + (f" ({ends[0]} to {ends[1]})" if ends else "")


def task_lines(rows: Sequence[Row]) -> list[str]:
    """Return the accuracies of dense model, uniform allocation and the best job, a line a task."""
    tasks = rows[best_jobs(rows)[0]].get("tasks") if rows else None
    if not tasks:
        return []
    lines = ["accuracy in percent: dense, uniform, found; p of found against uniform"]
    for name, figures in tasks.items():
        shares = (
            f"{100 * figures[key]['accuracy']:.1f} ± {100 * figures[key]['stderr']:.1f}"
            for key in ("dense", "uniform", "found")
        )
        lines.append(f"   {name}: {', '.join(shares)}; p = {figures['found_against_uniform'][1]:.2g}")
    return lines


def export_lines(folders: Sequence[Path], rows: Sequence[Row]) -> list[str]:
    """Return where exported models are, how large they are, and the code that loads them."""
    lines = []
    for folder, row in zip(folders, rows, strict=True):
        facts = row.get("export")
        if facts:
            where = _short(Path(facts["path"]))
            kl = row.get("finish", {}).get("kl_after", row["kl"])
            lines.append(f"{where}   {facts['bytes'] / 1e6:.1f} MB on disk, kl {kl:.4f}: {row['run']}")
            lines.append(f"   {facts['how_to_load']}")
        elif len(rows) == 1:
            lines.append(
                f"{_short(folder)}   allocation.json; not exported: python -m evosweep export {_short(folder)}"
            )
    if len(rows) > 1:
        lines.append(f"{_short(folders[0].parent)}/*   allocation.json, result.json, report/ and run.log of every job")
    return lines


def _short(path: Path) -> Path:
    """Return a path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


def viewer_commands(config: DictConfig, *, link: str | None, studies: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return the commands that show runs and studies in a browser, with their addresses.

    Args:
        config: The command's configuration.
        link: MLflow's address of the experiment, if the runs are tracked.
        studies: Journal of each study, and the folder of its pictures.
    """
    lines = []
    if link:
        command = build(config, "tracking").command
        seen = "every run, every generation"
        lines.append(f"{command}   # {seen}: {link}" if command else f"{link}   # {seen}")
    for path, artifacts in sorted(set(studies)):
        pictures = f" --artifact-dir {artifacts}" if artifacts else ""
        lines.append(f"optuna-dashboard {path}{pictures}   # every candidate: {DASHBOARD}")
    return lines


def studies_of(folders: Sequence[Path]) -> list[tuple[str, str | None]]:
    """Return the journals that jobs keep their studies in, and the folders of their pictures."""
    storages = [OmegaConf.load(folder / CONFIG).storage for folder in folders]
    return [(storage.path, storage.get("artifacts")) for storage in storages if storage.get("path")]


def _link(rows: Sequence[Row]) -> str | None:
    return next((str(row["mlflow_link"]) for row in rows if row.get("mlflow_link")), None)


def _log(run: Launch, status: str, began: Sequence[Path], rows: Sequence[Row], table: Any) -> None:
    """Close the multirun's parent run in every experiment that its jobs were logged to, with their comparison."""
    assert run.multirun is not None
    with ExitStack() as stack:
        if several_of(run.folder):
            folder = run.folder / REPORT
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files, note = _files(folder, rows, table)
        folders = run.jobs()
        pages = _winners_pages(folder, folders, rows)
        files += pages
        where = [f"The winner's report is under Artifacts: {pages[0].name}."] if pages else []
        listed = ["\n".join(lines) for lines in (_listed(tail_lines(rows)), _listed(task_lines(rows))) if lines]
        note = "\n\n".join([*verdicts(rows), *where, note, *listed, *reference(rows)])
        winners = sorted(best_jobs(rows), key=lambda index: float(rows[index]["search_loss"]))
        best = [str(rows[index]["mlflow_run"] or folders[index].absolute()) for index in winners]
        failures = []
        for config in _trackings(run.config, began):
            try:
                tracker = build(config, "tracking")
                tracker.summarize(run.multirun, status=status, files=files, note=note, best=best, folder=run.folder)
                if tracker.missing:
                    raise TrackingError(tracker.missing)
            except EvosweepError as error:
                failures.append(error)
    if failures:
        raise failures[0]


def _listed(lines: Sequence[str]) -> list[str]:
    """Return indented lines as a Markdown list."""
    return [f"- {line.strip()}" if line.startswith(" ") else line + "\n" for line in lines]


def _winners_pages(target: Path, folders: Sequence[Path], rows: Sequence[Row]) -> list[Path]:
    """Copy report and picture of each budget's best job under names that say whose they are; return the copies.

    Args:
        target: Folder to copy into.
        folders: Of the jobs.
        rows: Their results.
    """
    best = best_jobs(rows) if rows else []
    copies = []
    for index in best:
        name = "winner" if len(best) == 1 else f"winner {rows[index]['budget']}"
        for source, kind in (("report.html", ".html"), ("allocation.png", ".png")):
            path = folders[index] / REPORT / source
            if path.is_file():
                copies.append(Path(shutil.copyfile(path, target / f"{name}{kind}")))
    return sorted(copies, key=lambda path: path.suffix)


def _files(folder: Path, rows: Sequence[Row], table: Any) -> tuple[list[Path], str]:
    """Write the comparison as tables and figures; return the files, and the table in Markdown."""
    columns = [*COLUMNS, "mlflow_run", "dense_ppl"]
    data = [[row.get(key) for key in columns] for row in rows]
    files = [write_json(folder / "summary.json", {"columns": columns, "data": data})]
    if table is None:
        return files, ""
    compared = {"columns": comparison.COLUMNS, "data": comparison.table(rows)}
    files.append(write_json(folder / "comparison.json", compared))
    files += [path for draw in compared_figures for path in draw(rows, folder)]
    page = Console(record=True, width=160, file=io.StringIO())
    page.print(table)
    files.append(folder / "summary.txt")
    files[-1].write_text(page.export_text(), encoding="utf-8")
    return files, comparison.markdown(rows)


def _trackings(main: DictConfig, began: Sequence[Path]) -> list[DictConfig]:
    """Return a configuration for each tracking that jobs have; experiments may bring their own."""
    found: dict[str, DictConfig] = {}
    for folder in began:
        config = OmegaConf.load(folder / CONFIG)
        assert isinstance(config, DictConfig)
        own = _tracking(main, config)
        found.setdefault(OmegaConf.to_yaml(own.tracking), own)
    return list(found.values())


def _tracking(main: DictConfig, job: DictConfig) -> DictConfig:
    """Return a job's tracking and name.

    What a job kept of its settings is without credentials, so only what differs from the command's is taken from it.
    """
    own = OmegaConf.create({"tracking": OmegaConf.to_container(main.tracking), "name": job.name})
    if job.tracking.get("_target_") == main.tracking.get("_target_"):
        with open_dict(own):
            own.tracking.update({k: v for k, v in job.tracking.items() if k != "uri"})
    else:
        own.tracking = job.tracking
    return own
