"""What benchmarks on a model share: device, number type and seconds as arguments, overrides, lines of JSON."""

import argparse
import json
import time
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from rich.console import Console

from evosweep.cli.compose import imply_budget
from evosweep.tracking.console import RichProgress


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
    """Return the configuration that overrides make."""
    with initialize_config_module("conf", version_base=None):
        config = compose("config", overrides=overrides)
    imply_budget(config, overrides)
    return config


def progress() -> RichProgress:
    """Return a progress that is shown on standard error, so that standard output has lines of JSON alone."""
    shown = RichProgress()
    shown.console = Console(stderr=True)
    return shown


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
