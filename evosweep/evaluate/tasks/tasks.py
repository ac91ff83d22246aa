"""Tasks that the dense model, the uniform allocation and the winner are asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress, Silent
from evosweep.core.problem import Genome
from evosweep.evaluate.continuations import applied
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.tasks.accuracy import PER_CHARACTER, SCORES, Accuracy, judged
from evosweep.evaluate.tasks.library import LIBRARY
from evosweep.evaluate.tasks.log_likelihood import Encoded, encode, likelihoods
from evosweep.evaluate.tasks.questions import Question, read_questions


class Tasks:
    """Zero-shot tasks: which choice does a model find the most probable?

    Args:
        names: Tasks of the library.
        files: Own files of requests, in the same form; a task is named after its file.
        limit: Questions of each task at most; None: all.
        score: How choices of own files are compared: ``sum``, ``per_character`` or ``greedy``.
        batch_tokens: Tokens at once.

    Raises:
        SettingError: An unknown task or score, or a limit below two.
    """

    def __init__(
        self,
        *,
        names: Sequence[str] = (),
        files: Sequence[str] = (),
        limit: int | None = None,
        score: str = PER_CHARACTER,
        batch_tokens: int = 4096,
    ) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise SettingError("names", allowed="a list of tasks, as [hellaswag,piqa]", got=names)
        self.names = [check_choice("names", name, LIBRARY) for name in names]
        if isinstance(files, str) or not all(isinstance(path, str) for path in files):
            raise SettingError("files", allowed="a list of paths, as [own.jsonl]", got=files)
        self.files = {Path(path).name.split(".")[0]: path for path in files}
        if len(self.files) < len(files) or set(self.names) & set(self.files):
            raise SettingError("files", allowed="files whose names differ from one another and from tasks", got=files)
        self.limit = None if limit is None else check_int("limit", limit, low=2)
        self.score = check_choice("score", score, SCORES)
        self.batch_tokens = check_int("batch_tokens", batch_tokens, low=16)
        self._read: dict[str, list[list[Question]]] = {}
        self._encoded: dict[str, tuple[Any, int, list[Encoded]]] = {}

    @property
    def enabled(self) -> bool:
        """Whether there is a task."""
        return bool(self.names or self.files)

    @property
    def key(self) -> str:
        """What decides its figures."""
        return repr((self.names, self.files, self.limit, self.score))

    def questions(self) -> Mapping[str, list[list[Question]]]:
        """Return task -> questions, each a list of parts; files are read at the first call.

        Raises:
            DataError: A file cannot be read or a line of it has a wrong form.
            AssetError: The library cannot be downloaded.
        """
        for name in self.names:
            if name not in self._read:
                self._read[name] = read_questions(LIBRARY[name].read(), name=name, limit=self.limit)
        for name, path in self.files.items():
            if name not in self._read:
                try:
                    content = Path(path).read_bytes()
                except OSError as error:
                    raise DataError(f"tasks.files: {path} cannot be read: {error.strerror}") from error
                self._read[name] = read_questions(content, name=f"tasks.files: {path}", limit=self.limit)
        return self._read

    def ask(
        self, evaluator: Evaluator, genome: Genome | None, *, tokenizer: Any, progress: Progress | None = None
    ) -> dict[str, Accuracy]:
        """Return task -> accuracy of a model.

        Args:
            evaluator: The model and its levels.
            genome: Level index of every unit, shape (units,); None leaves the model dense.
            tokenizer: The model's.
            progress: Shows how far it is.
        """
        with applied(evaluator, genome):
            return self.ask_model(evaluator.anatomy.model, tokenizer=tokenizer, progress=progress)

    def ask_model(self, model: Any, *, tokenizer: Any, progress: Progress | None = None) -> dict[str, Accuracy]:
        """Return task -> accuracy of a model as it is.

        Args:
            model: A causal language model of transformers.
            tokenizer: The model's.
            progress: Shows how far it is.
        """
        return {
            name: self._accuracy(model, tokenizer, questions, name, progress or Silent())
            for name, questions in self.questions().items()
        }

    def _accuracy(
        self, model: Any, tokenizer: Any, questions: Sequence[list[Question]], name: str, progress: Progress
    ) -> Accuracy:
        encoded = self.encoded(name, model, tokenizer=tokenizer)
        found = likelihoods(model, encoded, batch_tokens=self.batch_tokens, progress=progress, description=name)
        return judged(questions, found, self.score_of(name))

    def score_of(self, name: str) -> str:
        """Return how the choices of a task are compared."""
        return LIBRARY[name].score if name in LIBRARY and name not in self.files else self.score

    def encoded(self, name: str, model: Any, *, tokenizer: Any) -> list[Encoded]:
        """Return the questions of a task as tokens, made once for all allocations of a model.

        Args:
            name: Of the task.
            model: A causal language model of transformers, which says how much it can read.
            tokenizer: The model's.
        """
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        made = self._encoded.get(name)
        if made is None or made[0] is not tokenizer or made[1] != longest:
            parts = [(index, part) for index, parts in enumerate(self.questions()[name]) for part in parts]
            made = (tokenizer, longest, encode(tokenizer, parts, longest=longest))
            self._encoded[name] = made
        return made[2]
