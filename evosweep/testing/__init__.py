"""Test suites that any implementation of an evosweep interface must pass; they need pytest.

Subclass a suite in a test module, implement ``make`` and let pytest collect it::

    from evosweep.testing import FitnessContract

    class TestMyFitness(FitnessContract):
        def make(self):
            return MyFitness()
"""

import pytest

# Before the suites are imported, so that a failed assertion in them shows its values.
pytest.register_assert_rewrite("evosweep.testing.data_source", "evosweep.testing.fitness")

from evosweep.testing.data_source import DataSourceContract  # noqa: E402
from evosweep.testing.fitness import FitnessContract  # noqa: E402

__all__ = ["DataSourceContract", "FitnessContract"]
