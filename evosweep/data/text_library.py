"""Texts that are known by a name, and the source that a name, a path or an object stands for."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from evosweep.core.errors import SettingError
from evosweep.data.documents import DocumentSource
from evosweep.data.python_sources import PythonSources
from evosweep.data.question_sets import SETS, QuestionSet
from evosweep.data.text import SUFFIXES, TextFiles
from evosweep.data.wikipedia import Wikipedia

LIBRARY: Mapping[str, Callable[[], DocumentSource]] = {
    "wikipedia": Wikipedia,
    "code": PythonSources,
    **{name: partial(QuestionSet, name=name) for name in SETS},
}

CHOSEN_BY = {"shares": "data.shares", "sources": "data.validation"}  # setting of the command line, by argument


def source_of(setting: str, given: object) -> DocumentSource:
    """Return the source that is meant by a name of the library, the path of a file or folder, or an object.

    Args:
        setting: Name of the argument that it was given for, for the error message.
        given: What the user gave.

    Raises:
        SettingError: Neither of them.
    """
    if callable(getattr(given, "documents", None)):
        return given  # type: ignore[return-value]
    if isinstance(given, str) and given in LIBRARY:
        return LIBRARY[given]()
    if isinstance(given, str) and given and (Path(given).suffix.lower() in SUFFIXES or Path(given).is_dir()):
        return TextFiles(path=given).named_by(CHOSEN_BY[setting])
    raise SettingError(
        setting, allowed=[*LIBRARY], got=given, hint=f"or the path of a {', '.join(SUFFIXES)} file or a folder of them"
    )


def short_name(given: str) -> str:
    """Return the name that a text is reported under: that of the library, or of the file without its suffix."""
    return given if given in LIBRARY else Path(given).name.split(".")[0]
