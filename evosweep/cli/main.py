"""Entry of the command line: runs subcommands or Hydra's jobs, prints each error as one line, returns an exit code."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from evosweep.cli import messages
from evosweep.cli.check import check_config
from evosweep.cli.compose import with_path
from evosweep.cli.disk import disk_error
from evosweep.cli.launch import JOBS
from evosweep.cli.launchers import (
    MAIN,
    failures,
    forget_failure,
    is_worker,
    keep_failure,
    number_of_job,
    passed_over,
    run_jobs,
)
from evosweep.cli.multirun import Refused, Summary
from evosweep.cli.resume import let_go
from evosweep.cli.signals import TERMINATED, Terminated, terminable
from evosweep.core.errors import EvosweepError, did_you_mean
from evosweep.core.redact import redact

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parent / "conf"
CONF = CHECKOUT if (CHECKOUT / "config.yaml").is_file() else PACKAGE / "conf"
SUBCOMMANDS = ("export", "score", "compare", "resume", "resolve", "sync", "worker", "cache")
BAD_INPUT = 2
INTERRUPTED = 130

_failures: list[tuple[str, int | None]] = []  # why jobs failed, and their numbers, for one block at the end


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(config: DictConfig) -> Any:
    """Run one job; bad input is kept, to be printed as one line at the end."""
    if passed_over():
        return None
    forget_failure()
    try:
        check_config(config, CONF)
        from evosweep.cli.joint import run  # noqa: PLC0415 - heavy; a misspelt setting is answered without it

        return run(config)
    except (EvosweepError, OmegaConfBaseException, OSError, SafetensorError) as error:
        named = _named(error, Path(HydraConfig.get().runtime.output_dir))
        if named is None:
            keep_failure(error)
            raise
        if is_worker():  # the command that started it reads that
            keep_failure(str(named))
        else:
            _failures.append((str(named), number_of_job()))
        return None
    except Exception as error:
        keep_failure(error)
        raise


def _named(error: Exception, folder: Path | None = None) -> EvosweepError | None:
    """Return the one-line error for something that a user can mend (a setting, a disk), or None for a bug.

    Args:
        error: The error.
        folder: Of the run that ended by it, if one did.
    """
    if isinstance(error, OSError | SafetensorError) and not isinstance(error, HydraException):
        return disk_error(error, folder)
    return messages.of(error, conf=CONF)


def main() -> None:
    """Run the command; exit code 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1."""
    arguments = sys.argv[1:]
    if not arguments:
        print(messages.WELCOME)  # noqa: T201
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        code = _command(arguments)
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is answered in one line
        from evosweep.cli.follow import one_of_several  # noqa: PLC0415 - heavy

        code = one_of_several(lambda: _command(arguments))
    if code:
        sys.exit(code)


def _command(arguments: list[str]) -> int:
    """Run a subcommand or Hydra's jobs; return the exit code."""
    if arguments[0] in SUBCOMMANDS:
        from evosweep.cli.commands import run_command  # noqa: PLC0415 - heavy

        return _one_line(lambda: run_command(arguments, CONF))
    near = did_you_mean(arguments[0], SUBCOMMANDS) if arguments[0].isalpha() else ""
    if near:
        text = f"{arguments[0]!r} must be a command{near}, or a setting and its value, as in seed=1"
        _print_errors([(text, None)])
        return BAD_INPUT
    flags = [text for text in arguments if text in ("-m", "--multirun")]
    if flags:  # Hydra reads them in front of settings alone
        sys.argv = [sys.argv[0], *flags, *(text for text in arguments if text not in flags)]
    os.environ[MAIN] = str(os.getpid())
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing a shortened traceback
    try:
        with terminable():
            return _run_jobs()
    finally:
        let_go()


def _run_jobs() -> int:
    """Run Hydra's jobs and what follows them; return the exit code."""
    code = 0
    unexpected = True
    count = ""
    try:
        run_jobs(job, folder=Summary.place, again=_again)
        unexpected = False
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        unexpected = False
    except Refused as refused:
        _failures.append((str(refused.error), None))
        unexpected = False
    except Exception as error:
        message = _of_the_user(error)
        if message is None:
            raise
        _failures.append((message, None))
        unexpected = False
    finally:
        count = os.environ.get(JOBS, "?")
        if not code:
            _add_failures()
        status = "KILLED" if code else "FAILED" if _failures or unexpected else "FINISHED"
        _end(status)
    if code:
        print(Summary.kept(), file=sys.stderr)  # noqa: T201
        return code
    _print_errors(_failures, count)
    return BAD_INPUT if _failures else 0


def _of_the_user(error: Exception) -> str | None:
    """Return the message of an error of composing, of folders or of a launcher; None for a bug of evosweep."""
    group_is_no_name = isinstance(error, ValueError) and "Config group override" in str(error)  # Hydra's own
    if group_is_no_name or isinstance(error, EvosweepError | HydraException | OmegaConfBaseException):
        return str(messages.of(error, conf=CONF))
    return None


def _again(folder: Path) -> None:
    """Prepare Hydra to run the command once more, going on with the multirun in a folder."""
    let_go()
    sys.argv = [*(text for text in sys.argv if not text.lstrip("+").startswith("resume=")), f"resume='{folder}'"]


def _add_failures() -> None:
    """Add to the failures what jobs of a multirun left in their folders,."""
    folder = Summary.place()
    known = {number for _, number in _failures}
    _failures.extend(found for found in (failures(folder) if folder else []) if found[1] not in known)


def _end(status: str) -> None:
    if Summary.active is None:
        return
    try:
        Summary.active.end(status)
    except EvosweepError as error:
        _failures.append((str(with_path(error)), None))


def _print_errors(failures: list[tuple[str, int | None]], count: str = "") -> None:
    """Print one line a reason, with the jobs of a multirun that failed of it."""
    jobs: dict[str, list[int]] = {}
    for text, job_number in failures:
        jobs.setdefault(text, []).extend([] if job_number is None else [job_number + 1])
    for text, numbers in jobs.items():
        which = f" (job {', '.join(map(str, numbers))} of {count})" if numbers else ""
        print(f"error: {redact(' '.join(text.split()))}{which}", file=sys.stderr)  # noqa: T201


def _one_line(call: Any) -> int:
    """Run a subcommand; return its exit code, bad input as one line."""
    with terminable():
        try:
            call()
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)  # noqa: T201
            return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        except (EvosweepError, HydraException, OmegaConfBaseException, OSError, SafetensorError) as error:
            named = _named(error)
            if named is None:
                raise
            _print_errors([(str(named), None)])
            return BAD_INPUT
        finally:
            let_go()
    return 0
