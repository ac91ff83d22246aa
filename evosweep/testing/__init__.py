"""Test suites that any implementation of an evosweep interface must pass; they need pytest.

Subclass a suite in a test module, implement ``make`` and let pytest collect it::

    from evosweep.testing import FitnessContract

    class TestMyFitness(FitnessContract):
        def make(self):
            return MyFitness()
"""

import importlib
from typing import TYPE_CHECKING, Any

import pytest

_MODULES = {
    "CompressorContract": "compressor",
    "DataSourceContract": "data_source",
    "ExporterContract": "exporter",
    "FitnessContract": "fitness",
    "SamplerContract": "sampler",
}
__all__ = ["CompressorContract", "DataSourceContract", "ExporterContract", "FitnessContract", "SamplerContract"]

# Before the suites are imported, so that a failed assertion in them shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES.values()))

if TYPE_CHECKING:
    from evosweep.testing.compressor import CompressorContract
    from evosweep.testing.data_source import DataSourceContract
    from evosweep.testing.exporter import ExporterContract
    from evosweep.testing.fitness import FitnessContract
    from evosweep.testing.sampler import SamplerContract


def __getattr__(name: str) -> Any:
    """Return a suite; its module is imported when it is asked for, since most of them need torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
