"""A bound on quality, for which the smallest size is looked for."""

import math
from collections.abc import Mapping

from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError

KINDS = ("kl", "ppl_ratio")


class Target:
    """What the compressed model may lose, given in one of two ways, on tokens of the search text.

    Args:
        kl: Nats per token that it may be from the dense model.
        ppl_ratio: Its perplexity over the dense model's, above 1.
        within: The size is narrowed down until the last bound that fails is so close below it, as a share of it.
        searches: Searches at most.
        tokens: Tokens of the search text that the target is measured on.

    Raises:
        SettingError: Both are given, or a value is out of range.
    """

    def __init__(
        self,
        *,
        kl: float | None = None,
        ppl_ratio: float | None = None,
        within: float = 0.005,
        searches: int = 5,
        tokens: int = 16384,
    ) -> None:
        given = {name: value for name, value in {"kl": kl, "ppl_ratio": ppl_ratio}.items() if value is not None}
        if len(given) > 1:
            raise SettingError("", owner=self, allowed=f"one of {', '.join(KINDS)}, not several", got=given)
        self.kind = next(iter(given), "")
        low = 1.0 if self.kind == "ppl_ratio" else 0.0
        self.value = check_number(self.kind, given[self.kind], low=low, exclusive=True) if given else 0.0
        self.within = check_number("within", within, low=0, high=1, exclusive=True)
        self.searches = check_int("searches", searches, low=1)
        self.tokens = check_int("tokens", tokens, low=1)

    def __bool__(self) -> bool:
        """Return whether there is a target."""
        return bool(self.kind)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def bound(self) -> float:
        """The largest loss that holds, in nats per token: the KL, or the logarithm of the ratio of perplexities."""
        return self.value if self.kind == "kl" else math.log(self.value)

    def loss(self, figures: Mapping[str, float], dense: Mapping[str, float]) -> float:
        """Return what ``bound`` bounds, of a model's ``kl`` and ``ppl`` and the dense model's."""
        return figures["kl"] if self.kind == "kl" else math.log(figures["ppl"] / dense["ppl"])

    def shown(self, loss: float) -> str:
        """Return a loss as users write targets: ``kl 0.0512``."""
        return f"{self.kind} {loss if self.kind == 'kl' else math.exp(loss):.4f}"
