"""Sizes of groups of columns, fitted to each layer's input width."""

from collections.abc import Mapping, Sequence

from evosweep.compressors.base import GROUP_OR_ROW, check_divides
from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError

AUTO = "auto"
SIZES = (128, 64, 32)
"""What ``auto`` tries, the largest first: what engines have kernels for."""
SMALLEST = 16  # of the other sizes that ``auto`` falls back to
Group = int | str | Sequence[int] | None
"""A size; ``auto``; sizes, of which a layer has the first that divides its input width; None: a whole row."""


def check_group(setting: str, group: object, *, low: int = 1) -> Group:
    """Return a group setting if it is one.

    Args:
        setting: Name of the argument.
        group: What the user gave.
        low: Least size.

    Raises:
        SettingError: It is none.
    """
    if group is None:
        return None
    if isinstance(group, str):
        return check_choice(setting, group, (AUTO,))
    if not isinstance(group, Sequence):
        return check_int(setting, group, low=low)
    sizes = [check_int(f"{setting}[{index}]", size, low=low) for index, size in enumerate(group)]
    if not sizes or len(set(sizes)) < len(sizes):
        raise SettingError(setting, allowed="null, auto, a size, or a list of sizes, each once", got=group)
    return sizes


def group_of(group: Group, columns: int, *, within: int = 0, multiple: int = 1) -> int:
    """Return how many columns a layer's groups have.

    Args:
        group: The setting, checked to fit.
        columns: The layer's input features.
        within: Number that the size must divide as well; 0: none.
        multiple: Number that the size must be a multiple of; it divides ``columns``.
    """
    if isinstance(group, int):
        return group
    if group is None:
        return columns

    def fits(size: int) -> bool:
        return columns % size == 0 and within % size == 0 and size % multiple == 0

    sizes = SIZES if isinstance(group, str) else group
    found = next((size for size in sizes if fits(size)), None)
    if found is not None or not isinstance(group, str):
        return found or columns
    low = 1 if within else SMALLEST
    return next((size for size in range(min(SIZES[0], columns), low - 1, -1) if fits(size)), columns)


def check_fits(group: Group, shapes: Mapping[str, tuple[int, int]], *, owner: object = None, within: int = 0) -> None:
    """Raise SettingError where a group setting has no size for some layer.

    Args:
        group: The setting.
        shapes: (out, in) by unit name.
        owner: The object whose argument it is.
        within: Number that a size must divide as well; 0: none.
    """
    hint = "auto gives each layer a size that fits it"
    if isinstance(group, int):
        check_divides("group", group, shapes, allowed=GROUP_OR_ROW, owner=owner, hint=hint)
    if group is None or isinstance(group, int | str):
        return
    for name, (_, columns) in shapes.items():
        if all(columns % size or within % size for size in group):
            allowed = f"sizes of which one divides {columns} ({name})"
            raise SettingError("group", owner=owner, got=list(group), allowed=allowed, hint=hint)
