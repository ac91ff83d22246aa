"""Further texts that results are reported on, each by itself; none of them selects anything."""

from collections.abc import Mapping, Sequence

from evosweep.core.errors import SettingError
from evosweep.data.documents import DocumentSource
from evosweep.data.text_library import short_name, source_of

PREFIX = "validation/"  # of the names of their splits


class Domains:
    """Texts of several kinds, side by side.

    Args:
        sources: Names of the library (``wikipedia``, ``code``, ``maths``, ``code_problems``, ``reading``) and paths of
            files or folders; or a mapping from a name to one of these or to a source.

    Raises:
        SettingError: No such text, or two with one name.
    """

    def __init__(self, *, sources: Sequence[str] | Mapping[str, str | DocumentSource] | None = None) -> None:
        given = sources or {}
        if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
            raise SettingError("sources", allowed="a list of texts, as [wikipedia,code,own.jsonl]", got=given)
        if isinstance(given, Mapping):
            named = {str(name): value for name, value in given.items()}
        else:
            named = {short_name(str(value)): value for value in given}
        if len(named) < len(given):
            raise SettingError("sources", allowed="texts whose names differ", got=list(given))
        self.sources: dict[str, DocumentSource] = {name: source_of("sources", value) for name, value in named.items()}


def domain_of(split: str) -> str | None:
    """Return the name of the domain that a split is of; None for the three splits of the main text."""
    return split.removeprefix(PREFIX) if split.startswith(PREFIX) else None
