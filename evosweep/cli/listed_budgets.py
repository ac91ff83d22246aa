"""A command whose budget is a list: the searches of its budgets, each in a folder of its own, below the run's."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from evosweep.cli.compose import build
from evosweep.cli.launch import MULTIRUN
from evosweep.core.budget import KINDS
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json, write_text
from evosweep.core.run_record import SEVERAL, RunRecord, several_of


def listed(config: DictConfig) -> str | None:
    """Return the kind of budget that is a list; None where it is a single one."""
    found = [kind for kind in KINDS if isinstance(config.budget.get(kind), ListConfig)]
    return found[0] if found else None


def single(config: DictConfig, kind: str) -> list[tuple[str, DictConfig]]:
    """Return the folder's name and the configuration of every budget of a list.

    Raises:
        SettingError: The list is empty, or a budget stands in it twice.
    """
    values = list(config.budget[kind])
    if not values or len(set(map(str, values))) < len(values):
        raise SettingError(f"budget.{kind}", allowed="a list of different budgets", got=values)
    found = []
    for value in values:
        own = OmegaConf.create({"budget": OmegaConf.to_container(config.budget)})
        assert isinstance(own, DictConfig)
        own.budget[kind] = value
        changed = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("budget", "hydra")])
        with open_dict(changed):
            changed.budget = own.budget
        build(changed, "budget")
        found.append((f"{kind}_{value}", changed))
    return found


def joint_name(folder: Path, config: DictConfig) -> str:
    """Return the name that the runs of a list of budgets share: their multirun's, an earlier one's, or a new one."""
    known = os.environ.get(MULTIRUN) or several_of(folder).get("multirun")
    return str(known or f"{config.name} {datetime.now():%Y-%m-%d %H:%M:%S.%f}"[:-3])


def write_several(folder: Path, names: Sequence[str], *, multirun: str, config: str) -> None:
    """Write what a later command needs to go on with the budgets of a run.

    Args:
        folder: Of the run.
        names: Of the budgets' folders below it.
        multirun: Name that joins them.
        config: Text of the run's settings.
    """
    write_text(folder / "config.yaml", config)
    write_json(folder / SEVERAL, {"budgets": list(names), "multirun": multirun})
    RunRecord().write(folder)
