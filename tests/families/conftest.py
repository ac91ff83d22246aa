"""All families are tried only where they are asked for: ``-m families``."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked ``families`` unless the expression of ``-m`` names that mark."""
    if "families" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("families")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("families")]
