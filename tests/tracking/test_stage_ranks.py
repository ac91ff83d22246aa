import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evosweep.core.events import Candidate, GenerationRecord, SearchResult
from evosweep.core.problem import Problem
from evosweep.tracking.artifacts.interactive import FIGURES
from evosweep.tracking.artifacts.stage_ranks import Stages, ranks


def record(problem: Problem, scores: list[dict[int, float]], generation: int = 1) -> GenerationRecord:
    genome = problem.uniform()
    return GenerationRecord(
        generation=generation,
        elite=problem.decode(genome),
        elite_slot=0,
        cost=problem.cost(genome),
        bits_per_weight=1.0,
        stages=(),
        candidates=tuple(Candidate(n, genome, each) for n, each in enumerate(scores)),
        validation={"kl": 0.5, "ppl": 9.0},
        tokens=10,
        tokens_per_second=1.0,
        changed=0,
        seconds=1.0,
        elapsed=1.0,
    )


def result(problem: Problem, records: list[GenerationRecord]) -> SearchResult:
    return SearchResult(
        sampler="evopress",
        seed=0,
        allocation=problem.decode(problem.uniform()),
        problem=problem,
        generations=tuple(records),
        validation={"kl": 0.5, "ppl": 9.0},
        dense={"kl": 0.0, "ppl": 8.0},
        tokens=10,
        seconds=1.0,
    )


def test_the_last_stage_s_best_is_ranked_in_every_stage(problem: Problem) -> None:
    scores = [{0: 4.0}, {0: 3.0, 1: 1.0}, {0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}]
    assert ranks(record(problem, scores)) == [(4, 0.5), (3, 0.0)]


def test_copies_and_generations_without_scores_count_nothing(problem: Problem) -> None:
    one = record(problem, [{0: 1.0, 1: 1.0}, {0: 2.0}])
    copy = replace(one, candidates=(*one.candidates, Candidate(2, problem.uniform(), {0: 1.0}, duplicate_of=0)))
    assert ranks(copy) == ranks(one) == [(2, 0.0), (1, 0.0)]
    assert ranks(record(problem, [{}])) == []


def test_survival_is_drawn_and_told(problem: Problem, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 8))
    records = [
        record(problem, [{0: float(v), **({1: float(v)} if n < 4 else {})} for n, v in enumerate(line)], generation)
        for generation, line in enumerate(values)
    ]
    Stages()(result(problem, records), tmp_path)
    table = json.loads((tmp_path / "stages.json").read_text())
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [row["scored"] for row in rows] == [8.0, 4.0]
    assert [row["survived_percent"] for row in rows] == [50.0, None]
    assert rows[1]["median_rank_of_best"] == 0.0 and 0 <= rows[0]["median_rank_of_best"] <= 100
    assert (tmp_path / "stages.png").stat().st_size > 10_000


def test_one_stage_has_nothing_to_tell(problem: Problem, tmp_path: Path) -> None:
    Stages()(result(problem, [record(problem, [{0: 1.0}, {0: 2.0}])]), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FIGURES)
def test_figures_to_hover_over_hold_what_they_show(problem: Problem, name: str) -> None:
    shown = json.loads(FIGURES[name](result(problem, [record(problem, [{0: 1.0}])])).to_json())["data"][0]
    if name == "convergence":
        assert shown["x"] == [10] and shown["y"] == [0.5]
    else:
        assert len(shown["text"]) == 3 and all(line == ["3bit"] * 4 for line in shown["customdata"])
