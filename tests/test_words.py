"""Names and sentences are in plain English; what departs from it is listed by ``python -m tests.style``."""

import pytest

from tests import style


@pytest.mark.parametrize("rule", ["docstring_words", "comment_words", "names", "missing_args"])
def test_words(rule: str) -> None:
    assert style.excess(rule) == []


def test_words_are_found_and_others_are_not() -> None:
    found = style.WORDS.findall("What a listener hears is told here; the like was said. It retells unsaid stories.")
    assert found == ["hears", "told", "the like", "said"]
