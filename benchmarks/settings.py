"""What benchmarks on a model share: device, number type and seconds as arguments, overrides, lines of JSON."""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console

from evosweep.cli.compose import build, imply_budget
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem
from evosweep.core.unit import with_columns
from evosweep.evaluate.sensitivity import MEASURES, measure
from evosweep.tracking.console import RichProgress
from evosweep.workbench import Workbench


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--device``, ``--dtype`` and ``--seconds``; what it does not know are overrides."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", help="auto, cpu, cuda; model.device if not given")
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16; model.dtype if not given")
    parser.add_argument("--seconds", type=float, default=80.0, help="after which nothing further is begun")
    return parser


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of the command line, and overrides of evosweep, device and number type among them."""
    arguments, overrides = parser.parse_known_args()
    for name in ("device", "dtype"):
        value = getattr(arguments, name)
        if value is not None:
            overrides.append(f"model.{name}={value}")
    return arguments, overrides


def names(text: str) -> list[str]:
    """Return the parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Return the whole numbers between commas."""
    return [int(part) for part in names(text)]


def sizes(text: str) -> list[float]:
    """Return the numbers between commas."""
    return [float(part) for part in names(text)]


def configured(overrides: list[str]) -> DictConfig:
    """Return the configuration that overrides make.

    Raises:
        EvosweepError: Hydra cannot compose them.
    """
    with initialize_config_module("conf", version_base=None):
        try:
            config = compose("config", overrides=overrides)
        except HydraException as error:
            raise EvosweepError(" ".join(str(error).split())) from error
    imply_budget(config, overrides)
    return config


def progress() -> RichProgress:
    """Return a progress that is shown on standard error, so that standard output has lines of JSON alone."""
    shown = RichProgress()
    shown.console = Console(stderr=True)
    return shown


def with_measurements(config: DictConfig, bench: Workbench, problem: Problem, tokens: int) -> tuple[Problem, int]:
    """Return a problem with the columns that a configured sampler reads, and the tokens that these are counted as.

    Args:
        config: Has the sampler and the seed.
        bench: What columns are measured on.
        problem: Units, levels, budget.
        tokens: For each unit.
    """
    spent = 0
    for name in build(config, "sampler")(problem=problem, seed=config.seed).columns:
        if name not in MEASURES:
            continue
        found, cost = measure(name, bench.evaluator, problem, tokens=tokens, seed=config.seed, progress=bench.progress)
        spent += cost
        problem = replace(problem, units=with_columns(problem.units, found))
    return problem, spent


class Clock:
    """Says when no further work should begin.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self.began = time.perf_counter()
        self.limit = seconds

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return round(time.perf_counter() - self.began, 1)

    @property
    def over(self) -> bool:
        """Whether its time is up."""
        return self.seconds >= self.limit


def say(**facts: Any) -> None:
    """Print a line of JSON at once."""
    print(json.dumps(facts), flush=True)
