"""The report of a search: figures and tables in the run's folder, with any tracker."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evosweep.core.checks import check_int
from evosweep.core.errors import SettingError
from evosweep.core.events import SearchResult

Artifact = Callable[[SearchResult, Path], None]
FOLDER = "report"


class Report:
    """Writes the report files of a result.

    Args:
        artifacts: Each writes what it has to say of a result into a folder; nothing, if that is nothing.
        prompts: Texts that the dense model, the uniform allocation and the winner continue, greedily.
        prompt_tokens: New tokens of each continuation at most.

    Raises:
        SettingError: ``prompts`` is no list of texts, or ``prompt_tokens`` no positive number.
    """

    def __init__(
        self, *, artifacts: Sequence[Artifact] = (), prompts: Sequence[str] = (), prompt_tokens: int = 32
    ) -> None:
        wrong = isinstance(prompts, str) or not isinstance(prompts, Sequence)
        if wrong or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise SettingError("prompts", allowed="a list of texts", got=prompts)
        self.artifacts = tuple(artifacts)
        self.prompts = tuple(prompts)
        self.prompt_tokens = check_int("prompt_tokens", prompt_tokens, low=1)

    def write(self, result: SearchResult, folder: Path) -> Path:
        """Write all of them into ``report/`` in a run's folder, and return it."""
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        for make in self.artifacts:
            make(result, target)
        return target
