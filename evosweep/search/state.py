"""The state of a search, saved as versioned JSON, from which it can continue.

A state is the records of all generations; parents, tokens, the surrogate's data and what a sampler remembers follow
from them. What a generation draws follows from (seed, generation, slot), so a search that continues from a state gives,
bit for bit, what it would have given without a stop.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evosweep.core.errors import EvosweepError
from evosweep.core.events import Candidate, GenerationRecord, StageRecord
from evosweep.core.files import write_text
from evosweep.core.genomes import genome_from_text, genome_to_text
from evosweep.core.problem import Genome, Problem

FORMAT = "evosweep search state"
VERSION = 3
SAMPLER = "sampler"
ANEW = "start the search anew without it"


@dataclass
class SearchState:
    """The state of a search after its last finished generation.

    Attributes:
        problem: What is searched over.
        identity: What else must be the same to continue: sampler, seed, stages ... (a JSON object).
        tokens_before: Tokens that were scored to prepare the search.
        records: One record for each generation.
        sampler: The sampler's own state (a JSON value), if it has one.
        cut: Whether a last generation was left out since its line was not written to its end.
    """

    problem: Problem
    identity: Mapping[str, Any]
    tokens_before: int = 0
    records: list[GenerationRecord] = field(default_factory=list)
    sampler: Any = None
    cut: bool = field(default=False, compare=False)
    _saved: int = field(default=0, repr=False, compare=False)  # records in the file
    _path: Path | None = field(default=None, repr=False, compare=False)

    @property
    def generation(self) -> int:
        """The generation that comes next."""
        return len(self.records)

    @property
    def parents(self) -> tuple[Genome, ...]:
        """Genomes that the next generation is made of, best first."""
        return self.records[-1].parents if self.records else ()

    @property
    def tokens(self) -> int:
        """Tokens scored so far."""
        return self.records[-1].tokens if self.records else self.tokens_before

    @property
    def seconds(self) -> float:
        """Seconds that the search has taken so far."""
        return self.records[-1].elapsed if self.records else 0.0

    @property
    def validation(self) -> Mapping[str, float]:
        """Validation figures of the elite."""
        return self.records[-1].validation if self.records else {}

    def check(self, identity: Mapping[str, Any], *, problem: Problem) -> None:
        """Raise EvosweepError where the search that would continue is another one, naming what differs."""
        _check_problem(self.problem.fingerprint, problem)
        for key in [*identity, *self.identity]:
            mine = self.identity.get(key)
            other = identity.get(key)
            if json.dumps(mine, sort_keys=True) != json.dumps(other, sort_keys=True):
                raise EvosweepError(
                    f"this search state is of a search with another {key} ({_short(mine)}, now {_short(other)}); "
                    f"set it as it was, or {ANEW}"
                )

    def dump(self) -> dict[str, Any]:
        """Return the state as JSON values; ``load`` reads it."""
        records = [_dump_record(self.problem, record) for record in self.records]
        return {**self._header(), SAMPLER: self.sampler, "generations": records}

    def _header(self) -> dict[str, Any]:
        """Return what does not change from generation to generation, as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "problem": self.problem.fingerprint,
            "identity": dict(self.identity),
            "tokens_before": self.tokens_before,
        }

    @classmethod
    def load(cls, value: Any, *, problem: Problem) -> "SearchState":
        """Return the state that ``dump`` gave.

        Args:
            value: What ``dump`` gave, after any trip through JSON.
            problem: The problem that the search would go on with.

        Raises:
            EvosweepError: It is no state, of another version or of another problem, or parts of it are missing.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise EvosweepError(f"this is no search state (a JSON object with format {FORMAT!r}); {ANEW}")
        if value.get("version") != VERSION:
            raise EvosweepError(
                f"this search state has version {_short(value.get('version'))}, this evosweep reads version "
                f"{VERSION}; continue it with the evosweep that wrote it, or {ANEW}"
            )
        _check_problem(value.get("problem"), problem)
        try:
            records = [_load_record(problem, index, record) for index, record in enumerate(value["generations"])]
            return cls(
                problem=problem,
                identity=dict(value["identity"]),
                tokens_before=int(value["tokens_before"]),
                records=records,
                sampler=value[SAMPLER],
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EvosweepError(f"this search state is damaged ({type(error).__name__}: {error}); {ANEW}") from error

    def save(self, path: Path) -> Path:
        """Write the state as JSON lines: a header, then a line for each generation.

        The first call writes the whole file under a temporary name; later ones append what is new, so that a generation
        costs as much after thousands as after one.
        """
        lines = [_dump_record(self.problem, record) for record in self.records[self._saved :]]
        if lines:
            lines[-1][SAMPLER] = self.sampler
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        if self._saved and path == self._path:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        else:
            write_text(path, f"{json.dumps(self._header())}\n{text}")
        self._path = path
        self._saved = len(self.records)
        return path

    @classmethod
    def read(cls, path: Path, *, problem: Problem) -> "SearchState":
        """Return the state that ``save`` wrote; a last line that was cut short is left out, and ``cut`` says so.

        Args:
            path: The file.
            problem: The problem that the search would go on with.

        Raises:
            EvosweepError: The file cannot be read, is damaged, or ``load`` refuses what it holds.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise EvosweepError(f"search state {path} cannot be read: {reason}") from error
        values = [_parsed(line) for line in lines]
        cut = len(values) > 1 and values[-1] is None
        if cut:
            values.pop()
        header = values[0] if values else None
        if header is None or None in values:
            raise EvosweepError(f"search state {path} is no JSON or was cut short; remove it, or {ANEW}")
        if isinstance(header, dict):
            sampler = values[-1].get(SAMPLER) if len(values) > 1 else None
            header = {**header, "generations": values[1:], SAMPLER: sampler}
        try:
            state = cls.load(header, problem=problem)
        except EvosweepError as error:
            raise EvosweepError(f"{path}: {error}") from error
        state.cut = cut
        return state


def _parsed(line: str) -> Any:
    """Return what a line of JSON holds; None where it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _check_problem(fingerprint: object, problem: Problem) -> None:
    if fingerprint != problem.fingerprint:
        raise EvosweepError(
            f"this search state is of another problem ({_short(fingerprint)}, this one is {problem.fingerprint}): "
            f"other units, levels, costs or budget; set them as they were, or {ANEW}"
        )


def _dump_record(problem: Problem, record: GenerationRecord) -> dict[str, Any]:
    """Return a generation as JSON values; what follows from the problem is left out."""
    stages = [_dump_stage(stage) for stage in record.stages]
    return {
        "generation": record.generation,
        "elite": genome_to_text(problem, problem.encode(record.elite)),
        "elite_slot": record.elite_slot,
        "parents": [genome_to_text(problem, parent) for parent in record.parents],
        "changed": record.changed,
        "tokens": record.tokens,
        "tokens_saved": record.tokens_saved,
        "tokens_per_second": record.tokens_per_second,
        "seconds": record.seconds,
        "elapsed": record.elapsed,
        "validation": {key: _number(number) for key, number in record.validation.items()},
        "facts": {key: _number(number) for key, number in record.facts.items()},
        "stages": stages,
        "candidates": _dump_candidates(problem, record.candidates),
    }


def _load_record(problem: Problem, index: int, value: Mapping[str, Any]) -> GenerationRecord:
    """Return the generation that ``_dump_record`` gave."""
    if value["generation"] != index:
        raise ValueError(f"generation {index} is missing")
    elite = genome_from_text(problem, value["elite"])
    cost = problem.cost(elite)
    return GenerationRecord(
        generation=index,
        elite=problem.decode(elite),
        elite_slot=value["elite_slot"],
        cost=cost,
        bits_per_weight=problem.bits_per_weight(cost),
        stages=tuple(_load_stage(stage) for stage in value["stages"]),
        candidates=_load_candidates(problem, value["candidates"]),
        validation={key: float(number) for key, number in value["validation"].items()},
        tokens=int(value["tokens"]),
        tokens_per_second=float(value["tokens_per_second"]),
        changed=int(value["changed"]),
        seconds=float(value["seconds"]),
        elapsed=float(value["elapsed"]),
        tokens_saved=int(value["tokens_saved"]),
        facts={key: float(number) for key, number in value["facts"].items()},
        parents=tuple(genome_from_text(problem, text) for text in value["parents"]),
    )


def _dump_stage(stage: StageRecord) -> list[Any]:
    """Return a stage's numbers as a list."""
    spread = map(_number, (stage.best, stage.median, stage.worst))
    return [stage.scored, stage.tokens, *spread, None if stage.parent is None else _number(stage.parent)]


def _load_stage(value: Sequence[Any]) -> StageRecord:
    """Return the stage that ``_dump_stage`` gave."""
    scored, tokens, best, median, worst, parent = value
    return StageRecord(
        int(scored), int(tokens), float(best), float(median), float(worst), None if parent is None else float(parent)
    )


def _dump_candidates(problem: Problem, candidates: tuple[Candidate, ...]) -> dict[str, Any]:
    """Return a generation's candidates as columns; parents' hashes are written once."""
    parents = list(dict.fromkeys(candidate.parent for candidate in candidates))
    return {
        "slots": [candidate.slot for candidate in candidates],
        "genomes": [genome_to_text(problem, candidate.genome) for candidate in candidates],
        "scores": [{str(stage): _number(score) for stage, score in c.scores.items()} for c in candidates],
        "parent_hashes": parents,
        "parents": [parents.index(candidate.parent) for candidate in candidates],
        "duplicates": {str(c.slot): c.duplicate_of for c in candidates if c.duplicate_of is not None},
    }


def _load_candidates(problem: Problem, value: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """Return the candidates that ``_dump_candidates`` gave."""
    columns = zip(value["slots"], value["genomes"], value["scores"], value["parents"], strict=True)
    return tuple(
        Candidate(
            slot=int(slot),
            genome=genome_from_text(problem, text),
            scores={int(stage): float(score) for stage, score in scores.items()},
            parent=value["parent_hashes"][parent],
            duplicate_of=value["duplicates"].get(str(slot)),
        )
        for slot, text, scores, parent in columns
    )


def _number(value: float) -> float | str:
    """Return a number as JSON can hold it exactly: text where it is not finite."""
    number = float(value)
    return number if number - number == 0 else str(number)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
