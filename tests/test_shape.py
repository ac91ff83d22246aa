"""Modules and functions stay short and know each other in one direction; see ``python -m tests.style``."""

import numpy as np
import pytest

from tests import style


@pytest.mark.parametrize(
    "rule",
    [
        "double_assignments",
        "long_functions",
        "long_modules",
        "repeated_names",
        "library_names",
        "import_circles",
    ],
)
def test_shape(rule: str) -> None:
    assert style.excess(rule) == []


def test_most_functions_are_short() -> None:
    assert np.percentile(style.function_lines(), 90) <= style.FUNCTION_LINES_P90


def test_a_departure_is_found(tmp_path, monkeypatch) -> None:
    package = tmp_path / "evosweep"
    (package / "search").mkdir(parents=True)
    (package / "models").mkdir()
    (package / "search" / "scipy.py").write_text(
        '"""What is told to whom."""\nimport scipy\nfrom evosweep.models import other\n'
        "def run(one, two, three):\n    a, b = 1, 2\n    a, b = b, a\n    return [each for each in three]  # said\n"
    )
    (package / "models" / "other.py").write_text("def late():\n    import evosweep.search.scipy\n" + "#\n" * 400)
    (package / "models" / "scipy.py").write_text("def long():\n" + "    pass\n" * 60)
    for folder in (package, package / "search", package / "models"):
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(style, "ROOT", package)
    monkeypatch.setattr(style, "ALLOWED", tmp_path / "none.json")
    scipy = package / "search" / "scipy.py"
    assert style.excess("docstring_words") == [f"{scipy}:1: 'told' in: What is told to whom."]
    assert style.excess("comment_words") == [f"{scipy}:7: 'said' in: # said"]
    assert style.excess("names") == [f"{scipy}:7: each"]
    assert style.excess("missing_args") == [f"{scipy}:4: run has 3 parameters and no Args:"]
    assert style.excess("double_assignments") == [f"{scipy}:5: a, b = (1, 2)"]
    assert style.excess("library_names") == [f"{scipy}:2: imports scipy"]
    assert style.excess("long_functions") == [f"{package}/models/scipy.py:1: long has 61 lines"]
    assert style.excess("long_modules") == [f"{package}/models/other.py:402: 402 lines"]
    assert len(style.excess("repeated_names")) == 2
    circle = "in a circle: evosweep.models.other, evosweep.search.scipy"
    assert [line.partition(": ")[2] for line in style.excess("import_circles")] == [circle] * 2
