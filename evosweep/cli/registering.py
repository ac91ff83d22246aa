"""The setting export.register: the name under which an export becomes a version of a registered MLflow model."""

from omegaconf import DictConfig

from evosweep.core.errors import SettingError
from evosweep.task import Exporter
from evosweep.tracking.base import Tracker
from evosweep.tracking.no_tracker import NoTracker

SETTING = "export.register"


def registered_name(config: DictConfig, tracker: Tracker, exporter: Exporter) -> str | None:
    """Return the name under which an export is to be registered as a model; None: it is not.

    Args:
        config: The whole configuration.
        tracker: Of runs.
        exporter: Writes the model.

    Raises:
        SettingError: MLflow allows no such name, or what is written cannot be registered.
    """
    name = config.export.get("register")
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip() or set(name) & set("/:"):
        raise SettingError(SETTING, allowed="null, or a name without '/' and ':'", got=name)
    hint = ""
    if not (exporter.enabled and getattr(exporter, "runs", True)):
        hint = "no model is exported"
    elif isinstance(tracker, NoTracker):
        hint = "runs are not tracked: tracking=mlflow"
    if hint:
        raise SettingError(SETTING, allowed="null", got=name, hint=hint)
    return name
