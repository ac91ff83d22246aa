"""The command line: compose, run, and say in one line what is wrong with a setting."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from evosweep import messages
from evosweep.core.errors import EvosweepError
from evosweep.multirun import Summary
from evosweep.settings import with_path

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent / "conf"
CONF = CHECKOUT if (CHECKOUT / "config.yaml").is_file() else PACKAGE / "conf"

_failures: list[EvosweepError] = []
MAIN = "EVOSWEEP_MAIN"  # environment: process of the command; a launcher's workers have another


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(config: DictConfig) -> Any:
    """Run one job; an error of the user's is kept for one clear line at the end."""
    from evosweep.run import run  # noqa: PLC0415 - heavy; a misspelt override should be told at once

    try:
        return run(config)
    except EvosweepError as error:
        if os.environ.get(MAIN) != str(os.getpid()):  # a launcher's worker: its parent must hear of it
            raise with_path(error) from error
        _failures.append(with_path(error))
        return None


def main() -> None:
    """Run the command; exit code 2 for what a user can mend, 130 after Ctrl-C."""
    os.environ[MAIN] = str(os.getpid())
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing a shortened traceback
    status = "FINISHED"
    try:
        job()
    except KeyboardInterrupt:
        status = "KILLED"
    except (EvosweepError, HydraException, OmegaConfBaseException) as error:
        _failures.append(messages.of(error, conf=CONF))
    finally:
        if _failures or sys.exc_info()[0] is not None:
            status = "FAILED"
        if Summary.active is not None:
            try:
                Summary.active.end(status)
            except EvosweepError as error:
                _failures.append(error)
    if status == "KILLED":
        print("interrupted; what was found is kept", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    for text in dict.fromkeys(str(failure) for failure in _failures):
        print(f"error: {text}", file=sys.stderr)  # noqa: T201
    if _failures:
        sys.exit(2)


if __name__ == "__main__":
    main()
