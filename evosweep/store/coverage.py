"""Which layers of the blocks are units, and what share of the blocks' weights these cover."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from evosweep.core.errors import SettingError, did_you_mean
from evosweep.core.patterns import matcher
from evosweep.models.anatomy import Anatomy
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.slots import Slot

NARROW = 32  # the side of a matrix that is a gate, a router or a step size rather than a layer ...
THIN = 8  # ... where its other side is more than so many times as long
ROUTING = re.compile(
    r"(^|\.)(router(\.\w+)*|gate|gate\.(wg|proj|linear)|shared_expert_gate|in_proj_(ba|a|b)|weights_proj|per_expert_scale)$"
)
"""Names of layers that choose experts, or gate heads and channels: few weights, on which all others depend."""
EXPERTS = re.compile(r"(^|\.)\w*experts?(\.|$)")
SHOWN = 4  # kinds of weights in a message


@dataclass(frozen=True)
class Left:
    """Weights of the blocks that no unit covers, of one kind.

    Attributes:
        kind: Path inside a block, indices as ``*``.
        count: How many such tensors there are.
        weights: In all of them, those that units do not cover.
    """

    kind: str
    count: int
    weights: int

    def text(self, total: int) -> str:
        """Return its kind, number, size, and share of so many weights."""
        return (
            f"{self.kind} ({self.count} x {_counted(self.weights // self.count)}, {100 * self.weights / total:.2g} %)"
        )


@dataclass(frozen=True)
class Coverage:
    """What share of the blocks' weights units cover; a vector (a bias, a norm's gain) is no weight here.

    Attributes:
        covered: Weights in units.
        total: Weights in the blocks.
        left: What is in no unit, the largest kind first.
    """

    covered: int
    total: int
    left: tuple[Left, ...]

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.covered / self.total if self.total else 1.0

    @property
    def text(self) -> str:
        """One line on the share, and on what is left out."""
        line = f"units cover {100 * self.share:.3g} % of the blocks' weights"
        return f"{line}; as they are: {self.named}" if self.left else line

    @property
    def named(self) -> str:
        """The largest kinds that are left out, with their sizes."""
        shown = [left.text(self.total) for left in self.left[:SHOWN]]
        more = len(self.left) - SHOWN
        return ", ".join(shown) + (f" and {more} kinds more" if more > 0 else "")

    def record(self) -> dict[str, object]:
        """Return the coverage as JSON."""
        kinds = [{"kind": left.kind, "count": left.count, "weights": left.weights} for left in self.left]
        return {"share": self.share, "weights": self.total, "left_out": kinds}


def coverage_of(anatomy: Anatomy, units: Iterable[Slot], dropped: Collection[int] = ()) -> Coverage:
    """Return what units cover of the weights of a model's blocks; tied weights count once.

    Args:
        anatomy: The model.
        units: The slots that are units.
        dropped: Ids of further parameters that count as covered: of what can be dropped.
    """
    covered: dict[int, int] = {}
    for slot in units:
        covered[id(slot.parameter)] = covered.get(id(slot.parameter), 0) + slot.shape[0] * slot.shape[1]
    total = 0
    kinds: dict[str, list[int]] = {}
    for name, parameter in anatomy.blocks.named_parameters():
        if parameter.dim() < 2:
            continue
        total += parameter.numel()
        rest = 0 if id(parameter) in dropped else parameter.numel() - covered.get(id(parameter), 0)
        if rest > 0:
            kinds.setdefault(_kind(name), []).append(rest)
    left = [Left(kind, len(sizes), sum(sizes)) for kind, sizes in kinds.items()]
    left.sort(key=lambda one: -one.weights)
    return Coverage(total - sum(one.weights for one in left), total, tuple(left))


def compressible(anatomy: Anatomy, include: Sequence[str] = ()) -> list[Slot]:
    """Return the layers of the blocks that are units: no router, no gate of heads or experts, nothing narrow.

    Args:
        anatomy: The model.
        include: Patterns of layers that are units whatever they are: globs or regular expressions for a layer's whole
            name, or its path inside of the block.

    Raises:
        SettingError: A pattern is neither, or matches no layer.
    """
    wanted: set[str] = set()
    kinds = {slot.name: slot.name.removeprefix(f"{anatomy.block_path}.{slot.block}.") for slot in anatomy.slots}
    for pattern in include:
        matches = matcher(pattern, setting="include")
        found = {name for name, kind in kinds.items() if matches(name) or matches(kind)}
        if not found:
            known = list(dict.fromkeys(kinds.values()))
            raise SettingError(
                "include",
                allowed="patterns that match a layer",
                got=pattern,
                hint=f"layers are {', '.join(known[:12])}{did_you_mean(pattern, known)}",
            )
        wanted |= found
    mixtures = {name.rpartition(".")[0] for name, _ in anatomy.model.named_modules() if EXPERTS.search(name)}
    return [slot for slot in anatomy.slots if slot.name in wanted or not _stays(slot, mixtures)]


def _stays(slot: Slot, mixtures: Collection[str]) -> bool:
    """Return whether a layer stays as it is: it routes or gates, or is too narrow to be worth a level."""
    parent, _, last = slot.name.rpartition(".")
    least, most = sorted(slot.shape)
    if least < NARROW and most > THIN * least:
        return True
    if isinstance(slot, RoutedSlot):  # of an expert, whose MLP's gate may be called so
        return False
    if last == "gate":  # of a mixture; elsewhere an MLP's gate may be called so
        return parent in mixtures
    return ROUTING.search(slot.name) is not None


def _kind(name: str) -> str:
    """Return a parameter's path inside of its block, without ``.weight`` and with indices as ``*``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.partition(".")[2].removesuffix(".weight"))


def _counted(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
