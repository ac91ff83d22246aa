"""Patterns by which settings name layers."""

import fnmatch
import re
from collections.abc import Callable

from evosweep.core.errors import SettingError


def matcher(pattern: str, *, setting: str) -> Callable[[str], bool]:
    """Return a function that says whether a name matches a glob, or a regular expression as a whole.

    Args:
        pattern: A glob (``self_attn.*``) or a regular expression (``mlp.(gate|up)_proj``).
        setting: Name of the argument that the pattern was given to.

    Raises:
        SettingError: It is neither.
    """
    try:
        regular = re.compile(pattern)
    except re.error as error:
        if not any(sign in pattern for sign in "*?["):
            raise SettingError(
                setting, allowed="a glob or a regular expression", got=pattern, hint=str(error)
            ) from error
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: fnmatch.fnmatchcase(name, pattern) or regular.fullmatch(name) is not None
