"""Names that become folders and files."""

import re

from evosweep.core.errors import SettingError

NAME = re.compile(r"\w[\w.-]{0,99}")


def check_name(name: object) -> None:
    """Raise SettingError where a name is no part of a path."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        allowed = "at most 100 letters, digits, '.', '_' and '-', the first a letter, a digit or '_'"
        raise SettingError("name", allowed=allowed, got=name if len(str(name)) <= 100 else f"{str(name)[:20]}...")
