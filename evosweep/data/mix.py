"""A mix of several texts with shares of the tokens."""

import math
from collections.abc import Mapping
from dataclasses import replace

from evosweep.core.checks import check_number
from evosweep.core.errors import SettingError
from evosweep.core.events import Progress
from evosweep.data.documents import Document, DocumentSource
from evosweep.data.text_library import source_of

EXACT = 1e-6


class Mix:
    """Several sources; calibration, search and validation get the same shares of each.

    Every source is divided into splits by itself, so that a source's held-out documents are the same in every mix.

    Args:
        shares: Share of the tokens by name; a name of the library, a path, or a name of ``sources``.
        sources: Sources by name, where a name or path is not enough.

    Raises:
        SettingError: No such text, a share that is not above zero, or shares that do not sum to 1.
    """

    def __init__(self, *, shares: Mapping[str, float], sources: Mapping[str, DocumentSource] | None = None) -> None:
        if not isinstance(shares, Mapping) or not shares:
            raise SettingError("shares", allowed="a share for each text, as {wikipedia: 0.7, code: 0.3}", got=shares)
        own = dict(sources or {})
        unused = [name for name in own if name not in shares]
        if unused:
            raise SettingError("sources", allowed="texts that shares names", got=unused)
        self.shares = {
            str(name): check_number(f"shares[{name}]", value, low=0, exclusive=True) for name, value in shares.items()
        }
        total = math.fsum(self.shares.values())
        if abs(total - 1) > EXACT:
            raise SettingError(
                "shares", allowed="shares that sum to 1", got=dict(shares), hint=f"their sum is {total:g}"
            )
        self.parts = {name: source_of("shares", own.get(name, name)) for name in self.shares}

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return the documents of all sources, ids with the source's name before them; shares are not applied here.

        Raises:
            DataError: A source cannot be read.
        """
        return [
            replace(document, id=f"{name}/{document.id}")
            for name, source in self.parts.items()
            for document in source.documents(progress=progress)
        ]


def shared_out(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return how many of ``count`` windows each part gets, by the largest remainder."""
    exact = {name: count * share for name, share in shares.items()}
    whole = {name: math.floor(value + EXACT) for name, value in exact.items()}
    left = count - sum(whole.values())
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:left]:
        whole[name] += 1
    return whole
