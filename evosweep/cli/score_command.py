"""The subcommand score: measures the allocation of a run, or any other, on a split or on other text."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from evosweep.cli.check import OWN, check_config
from evosweep.cli.compose import build, imply_budget
from evosweep.cli.find import find_run, find_winner
from evosweep.cli.job import WORKBENCH, bench_of, shared_progress
from evosweep.cli.reopen import Earlier, reopen, settings_of
from evosweep.core.allocation_text import load_genome
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Genome, Problem
from evosweep.data.images import ImageFiles
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.seeing import image_processor
from evosweep.workbench import anatomy_of

SPLITS = ("validation", "search", "calibration")
ALLOCATION = "allocation="
TEXT = ("data", "tokens", "evaluate")


@dataclass(frozen=True)
class _Scored:
    """What is scored: an allocation, the levels it is of, the text, and tasks if any are asked."""

    genome: Genome
    problem: Problem
    evaluator: Evaluator
    tuned: Any
    tokenizer: Any
    tasks: Tasks | None


def add_commands(commands: Any) -> None:
    """Add ``evosweep score`` to the command line's subcommands."""
    score = commands.add_parser(
        "score", help="measure an allocation on a split, or on other text: a run's, or a file's without any run"
    )
    score.add_argument(
        "overrides",
        nargs="*",
        metavar="run | allocation=<file> | setting=value",
        help="a run and what to change, as data=text data.path=other.txt for other text or tasks=core for tasks; "
        "or no run, but allocation=<allocation.json, list or GGUF file> with the settings of a run's command",
    )
    score.add_argument("--split", choices=SPLITS, default="validation")
    score.set_defaults(call=_score)


def _score(options: argparse.Namespace, conf: Path) -> None:
    files = [text.removeprefix(ALLOCATION) for text in options.overrides if text.startswith(ALLOCATION)]
    rest = [text for text in options.overrides if not text.startswith(ALLOCATION)]
    if len(files) > 1:
        raise EvosweepError(f"score takes one allocation=<file>, got {len(files)}")
    file = Path(files[0]) if files else None
    run = rest.pop(0) if rest and "=" not in rest[0] else None
    if run is not None:
        scored = _of_run(run, rest, conf, file)
    elif file is not None:
        scored = _of_settings(rest, conf, file)
    else:
        raise EvosweepError("score needs a run, or allocation=<file> and the settings of the run's command")
    print(json.dumps(_figures(scored, options.split)))  # noqa: T201 - for programs, too


def _of_run(run: str, overrides: Sequence[str], conf: Path, file: Path | None) -> _Scored:
    """Return a run's allocation, or a file's of the run's levels, on the run's text or another one."""
    folder = find_winner(run) if file is None else find_run(run)
    opened = reopen(folder, settings_of(folder, [], conf), allocation=file)
    evaluator = opened.bench.evaluator
    config = settings_of(folder, overrides, conf)
    if not all(_about_tasks(text) for text in overrides):
        evaluator = _on_other_text(opened, config)
    tokenizer = opened.bench.loaded.tokenizer
    return _Scored(opened.genome, opened.problem, evaluator, opened.tuned, tokenizer, _tasks(config, overrides))


def _of_settings(overrides: Sequence[str], conf: Path, file: Path) -> _Scored:
    """Return a file's allocation of the levels that settings describe, as on the command line of a search."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    OmegaConf.set_struct(config, value=False)
    check_config(config, conf)
    imply_budget(config, list(overrides))
    bench = bench_of(config)
    problem = bench.problem(build(config, "budget"))
    genome = load_genome(file, problem)
    return _Scored(genome, problem, bench.evaluator, {}, bench.loaded.tokenizer, _tasks(config, overrides))


def _about_tasks(override: str) -> bool:
    return override.lstrip("+").partition("=")[0].partition(".")[0] == "tasks"


def _tasks(config: DictConfig, overrides: Sequence[str]) -> Tasks | None:
    """Return the tasks that were typed, ``tasks=core``; None: none are asked, whatever the run's settings."""
    return build(config, "tasks") if any(_about_tasks(text) for text in overrides) else None


def _on_other_text(run: Earlier, config: DictConfig) -> Evaluator:
    """Return an evaluator of a run's levels, as they were calibrated, on the text that other settings name.

    Raises:
        EvosweepError: Something else than the text is changed, or the text cannot be used.
    """
    for key in WORKBENCH:
        if key not in TEXT and config[key] != run.config[key]:
            raise EvosweepError(f"{key} cannot be changed for a score: the allocation is one of the run's own levels")
    loaded = run.bench.loaded
    source = build(config, "data", without=OWN["data"])
    images = image_processor(loaded) if isinstance(source, ImageFiles) else None
    splits = build(config, "tokens").split(source, loaded.tokenizer, progress=shared_progress(), images=images)
    return Evaluator(
        anatomy=run.bench.anatomy if images is None else anatomy_of(loaded, splits),  # proved on these images
        store=run.bench.store,
        splits=splits,
        resources=build(config, "evaluate"),
        units=run.bench.units_of_search,
    )


def _figures(scored: _Scored, name: str) -> dict[str, Any]:
    """Return KL, perplexity and size of an allocation on a split."""
    evaluator = scored.evaluator
    split = evaluator.splits[name]
    figures: list[Fitness] = [KL(), Perplexity()]
    found: dict[str, Any]
    if name == "validation" and not scored.tuned:
        scorer = StagedScorer(evaluator, fitness=KL(), seed=0)
        found = {**scorer.validate(scored.genome), "kl_by_window": scorer.kl_by_window(scored.genome)}
    else:
        with evaluator.tuned(scored.tuned):
            values = evaluator.score(
                scored.genome[None], split=name, windows=range(len(split.windows)), fitness=figures
            )
        found = {key: float(value[0]) for key, value in values.items()}
    if scored.tasks is not None and scored.tasks.enabled:
        with evaluator.tuned(scored.tuned):
            asked = scored.tasks.ask(evaluator, scored.genome, tokenizer=scored.tokenizer, progress=shared_progress())
        found["tasks"] = {task: accuracy.row() for task, accuracy in asked.items()}
    cost = scored.problem.cost(scored.genome)
    return {
        "split": name,
        "text": split.hash,
        "tokens": split.tokens,
        **found,
        "bits_per_weight": scored.problem.bits_per_weight(cost),
        "size_mb": scored.problem.megabytes(cost),
    }
