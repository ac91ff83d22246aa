"""Datasets of the Hugging Face hub, through ``datasets``."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from evosweep.core.checks import check_int
from evosweep.core.errors import DataError, SettingError
from evosweep.core.events import Progress
from evosweep.data.documents import Document
from evosweep.data.sections import cut_if_few
from evosweep.data.table_rows import check_template, rows_to_documents

ANSWER_SECONDS = 10


class HubDataset:
    """The first rows of a dataset of the Hugging Face hub, streamed.

    Args:
        path: Its id, e.g. ``HuggingFaceFW/fineweb-edu``.
        name: Configuration, if it has several.
        split: Which of its splits to read.
        column: The column that holds the text.
        template: None for text; ``chat`` for a column of messages, rendered by the tokenizer's chat template.
        max_documents: Rows read at most.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        template: str | None = None,
        max_documents: int = 2000,
    ) -> None:
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="the id of a hub dataset, e.g. org/name", got=path)
        for setting, value in (("split", split), ("column", column)):
            if not isinstance(value, str) or not value:
                raise SettingError(setting, allowed=f"the name of a {setting}", got=value)
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.template = check_template(template)
        self.max_documents = check_int("max_documents", max_documents, low=3)

    def documents(self, *, progress: Progress) -> list[Document]:
        """Stream the first ``max_documents`` rows.

        Raises:
            DataError: The hub cannot be reached, or there is no such dataset, configuration, split or column.
        """
        progress.say(f"streaming {self.path} from the hub")
        check_reachable(self.path)
        rows = islice(self._rows(), self.max_documents)
        documents = rows_to_documents(rows, column=self.column, prefix=self.path, template=self.template)
        if not documents:
            raise DataError(f"data.path: hub dataset {self.path} has no text in its first {self.max_documents} rows")
        return cut_if_few(documents)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield rows; raise DataError for every failure, now or in mid-stream: it is the data or the network."""
        import datasets  # noqa: PLC0415 - slow to import, and only this source needs it

        datasets.disable_progress_bars()
        try:
            rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
                self.path, name=self.name, split=self.split, streaming=True
            )
            yield from rows
        except Exception as error:  # its builders raise many kinds
            raise DataError(f"data.path: hub dataset {self.path} cannot be read: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Config name is missing") and len(lines) > 1:
            return f"it has several configurations, set data.name; {lines[1]}"
        return lines[0]


def check_reachable(path: str) -> None:
    """Raise if the hub has no such dataset; asked once, before retries that cannot succeed.

    Nothing is asked in offline mode (``HF_HUB_OFFLINE``), where ``datasets`` reads its cache, nor for a local folder.

    Raises:
        DataError: No answer within ANSWER_SECONDS, or no such dataset.
    """
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only this source needs it
    from huggingface_hub import constants, errors  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE or os.path.isdir(path):  # noqa: PTH112 - an id is no Path
        return
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=ANSWER_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise DataError(
            f"data.path: hub dataset {path} cannot be read: there is none of this name that you may read "
            "(private and gated ones need `hf auth login`)"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.path: hub dataset {path} cannot be read: {reason}") from error
    except Exception as error:  # each HTTP library has its own kinds
        raise DataError(
            f"data.path: hub dataset {path} cannot be read: offline, {constants.ENDPOINT} does not answer "
            f"({type(error).__name__}); use data=text with a file, or HF_HUB_OFFLINE=1 for what the cache holds"
        ) from error
