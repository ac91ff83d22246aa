"""The subcommand resolve: another budget of a run, solved from what the run left, without scoring anything."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from evosweep.allocators.resolve import Resolved, Winner, harm_of, resolve
from evosweep.budget_list import measured
from evosweep.cli.compose import build
from evosweep.cli.export_command import WINNERS
from evosweep.cli.find import find_run
from evosweep.cli.folders import CLAIM
from evosweep.cli.job import bench_of, settings_text, shared_progress
from evosweep.cli.reopen import check_store, settings_of
from evosweep.core.allocation_text import load_genome
from evosweep.core.budget import KINDS
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.results import RESULT, read_result, write_result
from evosweep.core.run_record import several_of
from evosweep.core.unit import with_columns
from evosweep.pipeline import CONFIG, MEASURED
from evosweep.tracking.allocation_file import ALLOCATION
from evosweep.tracking.console import summary, terminal
from evosweep.workbench import Workbench

FOLDER = "resolved"  # below the run's
OF_WINNERS = (*WINNERS, "against", "kl_by_window", "search_loss", "search_loss_tokens", "domains", "mlflow_link")


def add_commands(commands: Any, *, run: str) -> None:
    """Add ``evosweep resolve`` to the command line's subcommands.

    Args:
        commands: Subparsers.
        run: How a run is named, for the help.
    """
    parser = commands.add_parser(
        "resolve", help="solve another budget from what a run measured and found; nothing is scored"
    )
    parser.add_argument("run", help=run)
    parser.add_argument("overrides", nargs="*", help="the budget, as budget.megabytes=80 or budget.megabytes=[70,80]")
    parser.set_defaults(call=_resolve)


def _resolve(options: argparse.Namespace, conf: Path) -> None:
    folder = find_run(options.run)
    kind, values = _budget(options.overrides)
    runs = _runs_of(folder)
    if not runs:
        raise EvosweepError(
            f"no search of the run in {folder} is over yet; python -m evosweep resume {folder} goes on with it"
        )
    folders = [path for path in (*runs, folder) if (path / MEASURED).is_file()]  # a target's run measures for all
    columns = measured(folders[0])[0] if folders else {}
    base = folders[0] if folders and folders[0] in runs else runs[0]
    config = settings_of(base, [], conf)
    budgets = {value: build(_with_budget(config, kind, value), "budget") for value in values}
    shared_progress().begin(prefix="", log=base / CLAIM, first="opened again to solve another budget")
    bench = bench_of(config)
    check_store(base, bench)
    units = with_columns(bench.units_of_search, columns)
    problems = {value: bench.problem(budget, units) for value, budget in budgets.items()}
    rows = []
    for value, problem in problems.items():
        found = resolve(problem, harm_of(problem, _sampler(config)), _winners(runs, problem))
        here = _with_budget(config, kind, value)
        rows.append(_write(folder / FOLDER / f"{kind}_{value}", found, problem, base, here, bench))
    console = terminal()
    console.print(summary(rows, title=f"{config.name}, predicted"))
    for row in rows:
        text = f"{row['folder']}: {row['made_of']}; predicted, nothing was scored: python -m evosweep export writes it"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _budget(overrides: Sequence[str]) -> tuple[str, list[Any]]:
    """Return the kind of budget that was typed, and its values.

    Raises:
        EvosweepError: None or several were typed, or something else.
    """
    if len(overrides) != 1 or not overrides[0].startswith("budget.") or "=" not in overrides[0]:
        raise EvosweepError(
            f"resolve takes one budget, as budget.megabytes=80 or budget.bits_per_weight=[2.5,3], got "
            f"{' '.join(overrides) or 'none'}"
        )
    key, _, text = overrides[0].partition("=")
    kind = key.removeprefix("budget.")
    if kind not in KINDS:
        raise SettingError("budget", allowed=KINDS, got=kind)
    value = OmegaConf.from_dotlist([f"value={text}"]).value
    values = list(value) if isinstance(value, ListConfig) else [value]
    if not values or len(set(map(str, values))) < len(values):
        raise EvosweepError(f"{key} must be one budget, or a list of different ones, got {text}")
    return kind, values


def _runs_of(folder: Path) -> list[Path]:
    """Return the folders of a run's searches that are over: its own, or those of its several budgets."""
    names = several_of(folder).get("budgets", ())
    searches = [folder / str(name) for name in names] if names else [folder]
    return [path for path in searches if all((path / name).is_file() for name in (ALLOCATION, CONFIG, RESULT))]


def _winners(runs: Sequence[Path], problem: Problem) -> list[Winner]:
    """Return the winning allocations of finished runs with their measured KL; of a front, every point."""
    winners = []
    for run in runs:
        row = read_result(run / RESULT)
        searched = len(row.get("history", ())) > 1
        genome = load_genome(run / ALLOCATION, problem)
        winners.append(Winner(run.name, genome, float(row["kl"]), searched))
        for point in row.get("front", ()):
            genome = problem.encode(point["allocation"])
            winners.append(Winner(f"{run.name}'s point {point['point']}", genome, float(point["kl"]), searched))
    return winners


def _sampler(config: DictConfig) -> Mapping[str, Any]:
    section = OmegaConf.to_container(config.sampler)
    assert isinstance(section, dict)
    return {str(key): value for key, value in section.items()}


def _with_budget(config: DictConfig, kind: str, value: Any) -> DictConfig:
    changed = copy.deepcopy(config)
    with open_dict(changed):
        for other in KINDS:
            changed.budget[other] = value if other == kind else None
    return changed


def _write(
    target: Path, found: Resolved, problem: Problem, base: Path, config: DictConfig, bench: Workbench
) -> dict[str, Any]:
    """Write a run's folder with the allocation, settings and a row of predicted figures; return the row.

    Args:
        target: The folder.
        found: The allocation.
        problem: Units and levels under the budget.
        base: Folder of the run that it was made from.
        config: Settings with the budget.
        bench: The model and its levels.
    """
    target.mkdir(parents=True, exist_ok=True)
    cost = problem.cost(found.genome)
    figures = {
        "bits_per_weight": problem.bits_per_weight(cost),
        "size_mb": problem.megabytes(cost),
        "sparsity": problem.sparsity(found.genome),
        "kl": found.kl,
        "ppl": None,
        "tokens": 0,
        "seconds": 0.0,
        "predicted": True,
        "made_of": found.made_of,
    }
    known = read_result(base / RESULT)
    budget = str(build(config, "budget"))
    name = " ".join(["predicted", bench.loaded.name, budget])
    row = {key: value for key, value in known.items() if key not in OF_WINNERS}
    row |= {"run": name, "budget": budget, "folder": str(target), "store": bench.store.key, "mlflow_run": None}
    row |= figures
    problem.save(problem.decode(found.genome), target / ALLOCATION, store=bench.store.key, **figures)
    (target / CONFIG).write_text(settings_text(config, [f"budget.{text}" for text in budget.split()]), encoding="utf-8")
    write_result(target, row)
    return row
