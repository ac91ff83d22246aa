"""Rules of a problem: which units take no part, and which levels the others may have.

Rules only ever shorten ladders, so that no search has to know of them: a unit that is fixed has one level. What is
excluded is no unit at all and stays as it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from evosweep.core.errors import SettingError, did_you_mean
from evosweep.core.patterns import matcher
from evosweep.core.ties import joined_ties
from evosweep.core.unit import Level, Unit

LevelName = str | int | float
Ladders = Mapping[str, tuple[str, ...]]
"""Names of the levels that remain of a unit, by its name; units that no rule is about are left out."""

SHOWN = 12  # names in one message


@dataclass(frozen=True)
class Rules:
    """Limits on units by pattern: a glob or a regular expression for a whole name, or for the path inside of a block.

    Attributes:
        exclude: Patterns of what is no unit and stays as it is.
        fix: Level that units have, by pattern; a level is given by its name (``3bit``) or its number (``3``).
        min: Level that units have at least: it and all that cost as much or more.
        max: Level that units have at most.
    """

    exclude: Sequence[str] = ()
    fix: Mapping[str, LevelName] = field(default_factory=dict)
    min: Mapping[str, LevelName] = field(default_factory=dict)
    max: Mapping[str, LevelName] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str) or not isinstance(self.exclude, Sequence):
            raise SettingError("exclude", allowed="a list of patterns", got=self.exclude)
        for position, pattern in enumerate(self.exclude):
            matcher(pattern, setting=f"exclude[{position}]")
        for name in ("fix", "min", "max"):
            levels = getattr(self, name)
            if not isinstance(levels, Mapping):
                raise SettingError(
                    name, allowed=f"levels by pattern, as {name}: {{mlp.down_proj: 3bit}}, or null", got=levels
                )
            for pattern, level in levels.items():
                matcher(pattern, setting=f"{name}[{pattern}]")
                if isinstance(level, bool) or not isinstance(level, str | int | float):
                    raise SettingError(f"{name}[{pattern}]", allowed="a level's name or number", got=level)

    def excluded(self, names: Mapping[str, str]) -> frozenset[str]:
        """Return the names that take no part.

        Args:
            names: Path inside of its block, by the name of everything that could be a unit.

        Raises:
            SettingError: A pattern matches nothing, or nothing is left.
        """
        found: set[str] = set()
        for position, pattern in enumerate(self.exclude):
            matches = matched(f"exclude[{position}]", pattern, names)
            found |= set(matches)
        if found and len(found) == len(names):
            raise SettingError("exclude", allowed="patterns that leave a unit", got=list(self.exclude))
        return frozenset(found)

    def ladders(self, units: Sequence[Unit], ties: Iterable[Sequence[str]] = ()) -> Ladders:
        """Return the levels that remain of every unit that a rule is about; ties take what remains of all their layers.

        Args:
            units: With all their levels, tied layers one by one.
            ties: Names of layers that share a level.

        Raises:
            SettingError: A pattern matches nothing, a unit lacks the level, or rules contradict each other.
        """
        reasons: dict[str, list[tuple[str, frozenset[str]]]] = {}
        names = {unit.name: unit.kind for unit in units}
        by_name = {unit.name: unit for unit in units}
        for setting, levels, keeps in (("fix", self.fix, _same), ("min", self.min, _above), ("max", self.max, _below)):
            for pattern, wanted in levels.items():
                rule = f"{setting}[{pattern}]"
                for name in matched(rule, pattern, names):
                    kept = _kept(by_name[name], wanted, keeps, rule)
                    reasons.setdefault(name, []).append((f"{rule}={wanted}", kept))
        if not reasons:
            return {}
        for group in joined_ties(ties, by_name):
            together = [reason for name in sorted(group) for reason in reasons.get(name, ())]
            if together:
                reasons.update(dict.fromkeys(group, together))
        return {name: _remaining(by_name[name], found) for name, found in reasons.items()}


def limited(units: Sequence[Unit], ladders: Ladders) -> tuple[Unit, ...]:
    """Return units with the levels that remain of them."""
    return tuple(
        replace(unit, levels=tuple(level for level in unit.levels if level.name in ladders[unit.name]))
        if unit.name in ladders
        else unit
        for unit in units
    )


def matched(setting: str, pattern: str, names: Mapping[str, str]) -> list[str]:
    """Return the names that a pattern matches.

    Args:
        setting: That the pattern was given to.
        pattern: A glob or a regular expression.
        names: Path inside of its block, by the name of everything that could match.

    Raises:
        SettingError: There are none; the nearest is suggested.
    """
    matches = matcher(pattern, setting=setting)
    found = [name for name, kind in names.items() if matches(name) or matches(kind)]
    if not found:
        kinds = list(dict.fromkeys(names.values()))
        near = did_you_mean(_last(pattern), kinds, key=_last) or did_you_mean(pattern, [*kinds, *names])
        raise SettingError(
            setting,
            allowed="a pattern that matches a unit",
            got=pattern,
            hint=f"units are {', '.join(kinds[:SHOWN])}{near}",
        )
    return found


def _last(name: str) -> str:
    """Return the part of a name behind its last dot: ``q_proj`` of ``self_attn.q_proj``, which users type alone."""
    return name.rpartition(".")[2]


def _same(level: Level, wanted: Level) -> bool:
    return level.name == wanted.name


def _above(level: Level, wanted: Level) -> bool:
    return level.cost >= wanted.cost


def _below(level: Level, wanted: Level) -> bool:
    return level.cost <= wanted.cost


def _kept(unit: Unit, wanted: LevelName, keeps: Callable[[Level, Level], bool], setting: str) -> frozenset[str]:
    """Return the names of the levels that a rule keeps of a unit.

    Args:
        unit: With all its levels.
        wanted: Name or number of the level that the rule gives.
        keeps: Whether the rule keeps a level, given the one that it names.
        setting: The rule.

    Raises:
        SettingError: The unit has no such level.
    """
    number = wanted if isinstance(wanted, int | float) else None
    for level in unit.levels:
        same_number = number is not None and level.nominal is not None and level.nominal.number == number
        if level.name == str(wanted) or same_number:
            return frozenset(other.name for other in unit.levels if keeps(other, level))
    raise SettingError(setting, allowed=unit.level_names, got=wanted, hint=f"these are the levels of {unit.name}")


def _remaining(unit: Unit, reasons: Sequence[tuple[str, frozenset[str]]]) -> tuple[str, ...]:
    """Return the names of the levels that all rules about a unit keep.

    Raises:
        SettingError: There are none.
    """
    names = tuple(name for name in unit.level_names if all(name in kept for _, kept in reasons))
    if not names:
        rules = list(dict.fromkeys(rule for rule, _ in reasons))
        raise SettingError(
            rules[0].partition("=")[0],
            allowed=f"a rule that leaves {unit.name} a level",
            got=" and ".join(rules),
            hint="they contradict each other" if len(rules) > 1 else "",
        )
    if unit.gates and unit.level_names[0] not in names:
        raise SettingError(
            reasons[0][0].partition("=")[0],
            allowed=f"a rule that lets {unit.name} be {unit.level_names[0]}",
            got=reasons[0][0],
            hint="exclude keeps it",
        )
    return names
