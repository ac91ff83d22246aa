"""What calibration has seen of the experts of a mixture: how many tokens went to each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evosweep.store.manifest_rows import ManifestUnit

ROUTED_TOKENS = "routed_tokens"  # column of the manifest: calibration tokens that the router sent to an expert
ROUTED_SHARE = "routed_share"  # the same as a share of all calibration tokens, at least one of them
FEW = 0.1  # share of the experts that may have met fewer tokens than their inputs are wide, unsaid


@dataclass(frozen=True)
class Met:
    """How many calibration tokens went to one expert.

    Attributes:
        name: Path of the expert.
        tokens: Their number.
        width: Of the expert's widest input: a second moment of fewer tokens is singular.
    """

    name: str
    tokens: int
    width: int


def met(units: Sequence[ManifestUnit]) -> list[Met]:
    """Return what each expert among a store's units met."""
    found: dict[str, Met] = {}
    for unit in units:
        if ROUTED_TOKENS in unit.columns and unit.shape is not None:
            name = unit.name.rpartition(".")[0]
            width = max(unit.shape[1], found[name].width if name in found else 0)
            found[name] = Met(name, int(unit.columns[ROUTED_TOKENS]), width)
    return list(found.values())


def routing_notes(units: Sequence[ManifestUnit], tokens: int) -> list[str]:
    """Return what a user should know of the experts that met few calibration tokens, a line each.

    Args:
        units: Of the store.
        tokens: Calibration tokens in all.
    """
    experts = met(units)
    never = [expert.name for expert in experts if not expert.tokens]
    few = [expert for expert in experts if expert.tokens < expert.width]
    notes = []
    if never:
        shown = ", ".join(never[:3]) + (" ..." if len(never) > 3 else "")
        notes.append(
            f"{len(never)} of {len(experts)} experts met no calibration token; their levels are fitted to a few tokens "
            f"of all instead: {shown}"
        )
    if len(few) > FEW * len(experts):
        wanted = sorted(tokens * expert.width / max(expert.tokens, 0.5) for expert in experts)
        enough = math.ceil(wanted[math.ceil((1 - FEW) * len(wanted)) - 1])
        notes.append(
            f"{len(few)} of {len(experts)} experts met fewer calibration tokens than their inputs are wide; "
            f"tokens.calibration={_rounded(enough)} would do for nine in ten"
        )
    return notes


def _rounded(number: int) -> int:
    """Return a number rounded up to two digits."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
