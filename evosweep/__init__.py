"""evosweep: fit a language model into a size, with proof of which layers to compress how hard.

From Python: ``load`` a model, ``tokenize`` text, ``build_store``, ``make_problem``, ``run_search``, ``export``. Names
are imported when they are first used, so that ``import evosweep`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "evosweep.api",
    "tokenize": "evosweep.api",
    "build_store": "evosweep.api",
    "make_problem": "evosweep.api",
    "run_search": "evosweep.api",
    "export": "evosweep.api",
    "load_packed": "evosweep.api",
    "Budget": "evosweep.core.budget",
    "Allocation": "evosweep.core.allocation",
    "Problem": "evosweep.core.problem",
    "SearchResult": "evosweep.core.events",
    "EvosweepError": "evosweep.core.errors",
    "Workbench": "evosweep.workbench",
    "GPTQ": "evosweep.compressors.gptq",
    "RoundToNearest": "evosweep.compressors.rtn",
    "SparseGPT": "evosweep.compressors.sparsegpt",
    "Rotate": "evosweep.models.transforms.rotate",
    "EvoPressSampler": "evosweep.samplers.evopress",
    "AllocatorSampler": "evosweep.samplers.static",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    """Return a public name, its module imported now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
