import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evosweep.core.errors import EvosweepError
from evosweep.core.events import GenerationRecord, SearchResult, SearchStarted
from evosweep.core.genomes import genome_from_text, genome_to_text
from evosweep.core.problem import Problem
from evosweep.core.unit import Unit
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.samplers.optuna_native import OptunaSampler
from evosweep.samplers.random import RandomFeasibleSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.search.state import VERSION, SearchState
from evosweep.testing.problems import ladder, make_problem

STAGES = [{"survivors": 3, "tokens": 64}, {"survivors": 1, "tokens": 256}]
GENERATIONS = 6
TIMES = ("seconds", "elapsed", "tokens_per_second")


class Noisy:
    """Losses with noise that follows from (generation, stage, genome) alone, in windows of 64 tokens."""

    seq_len = 64

    def __init__(self, problem: Problem) -> None:
        size = len(problem.units)
        self.linear = (np.arange(size) * 7) % 11 - 5
        self.pairs = (np.arange(size)[:, None] * np.arange(size)[None]) % 5 - 2

    def true(self, genomes: np.ndarray) -> np.ndarray:
        return 30.0 - genomes @ self.linear + np.einsum("ni,ij,nj->n", genomes, self.pairs, genomes) / 4

    def losses(self, genomes, *, generation: int, stage: int, tokens: int, windows: slice, length: int):
        rng = np.random.default_rng([generation, stage])
        tilt = rng.normal(size=(tokens // 64, 64, genomes.shape[1]))[windows, : length - 1] / 2
        return (self.true(genomes)[:, None, None] + np.einsum("wtu,nu->nwt", tilt, genomes)).astype(np.float32)

    def reduce(self, loss: float) -> float:
        return float(loss)

    def score(self, genomes, *, generation: int, stage: int, tokens: int):
        place = {"generation": generation, "stage": stage, "tokens": tokens}
        scores = self.losses(genomes, **place, windows=slice(0, tokens // 64), length=64).mean(axis=(1, 2))
        broken = (
            genomes @ np.arange(genomes.shape[1]) + generation
        ) % 7 == 0  # some are no number, and are infinite in the records
        return np.where(broken & (stage == 0), np.nan, scores.astype(np.float64))

    def score_all(self, genomes, *, limit: int | None):
        return self.true(genomes) + genomes @ np.linspace(-1, 1, genomes.shape[1])

    def final_tokens(self, limit: int | None) -> int:
        return limit or 4096

    def validate(self, genome):
        return {"kl": float(self.true(genome[None])[0]) / 3, "ppl": float(np.exp(genome.mean()))}


SAMPLERS = {
    "evopress": lambda problem: EvoPressSampler(problem, seed=3, offspring=12),
    "several parents": lambda problem: EvoPressSampler(problem, seed=5, offspring=10, population_size=3),
    "random": lambda problem: RandomFeasibleSampler(problem, seed=4, offspring=8),
    "tpe": lambda problem: OptunaSampler(problem, kind="tpe", seed=1, offspring=4),
}
PLANS = {
    "plain": {"final": True},
    "raced": {"racing": 0.2, "final": 128},
    "screened": {"surrogate": 0.4},
    "bounded": {"tokens": 9000, "patience": 2},
}


def search(problem: Problem, sampler: str = "evopress", *, generations: int = GENERATIONS, listeners=(), **more):
    plan = Plan.of(generations=generations, stages=STAGES, **more.pop("plan", PLANS["plain"]))
    return run_search(
        name="x",
        sampler=SAMPLERS[sampler](problem),
        scorer=Noisy(problem),
        plan=plan,
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=list(listeners),
        tokens_spent=100,
        **more,
    )


def timeless(problem: Problem, result: SearchResult) -> dict:
    """Return everything that a result says but for its times, as JSON."""
    state = SearchState(problem=problem, identity={}, records=list(result.generations)).dump()
    for record in state["generations"]:
        for key in TIMES:
            del record[key]
    row = {key: value for key, value in result.row().items() if key != "seconds"}
    final = None if result.final is None else [result.final.scores, result.final.tokens, result.final.spent]
    facts = [row, final, result.stopped, result.winner_generation, dict(result.validation), dict(result.allocation)]
    return json.loads(json.dumps([state, facts]))


class Stop(Exception):
    pass


class Stopper:
    """A listener that dies in one generation, as a tracker would."""

    def __init__(self, generation: int) -> None:
        self.generation = generation

    def on_event(self, event) -> None:
        if isinstance(event, GenerationRecord) and event.generation == self.generation:
            raise Stop


def stopped(problem: Problem, generation: int, path: Path, *arguments, **more) -> SearchState | None:
    """Run a search until it is stopped after a generation; return its state, read from its file."""
    try:
        search(problem, *arguments, listeners=[Stopper(generation)], state_path=path, **more)
    except Stop:
        return SearchState.read(path, problem=make_problem())
    return None  # it had ended before


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sampler", ["evopress", "several parents"])
def test_a_search_that_was_stopped_anywhere_ends_as_if_it_never_was(
    problem: Problem, tmp_path: Path, sampler: str, plan: str
) -> None:
    settings = {"plan": PLANS[plan]}
    whole = timeless(problem, search(problem, sampler, **settings))
    assert len({record["elite"] for record in whole[0]["generations"]}) > 2
    for generation in range(GENERATIONS + 1):
        state = stopped(problem, generation, tmp_path / f"{generation}.json", sampler, **settings)
        if state is None:
            assert plan == "bounded" and generation > 3
            continue
        assert state.generation == generation + 1
        assert timeless(problem, search(make_problem(), sampler, state=state, **settings)) == whole


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_that_remember_go_on_where_they_were(problem: Problem, tmp_path: Path, sampler: str) -> None:
    whole = timeless(problem, search(problem, sampler))
    state = stopped(problem, 3, tmp_path / "state.json", sampler)
    assert timeless(problem, search(problem, sampler, state=state)) == whole


def test_a_sampler_with_a_state_of_its_own_gets_it_back(problem: Problem, tmp_path: Path) -> None:
    class Counting(EvoPressSampler):
        """Proposes by a count that it keeps."""

        count = 0

        def population(self, *, generation, parents):
            self.count += 1
            return super().population(generation=generation * self.count, parents=parents)

        def state(self):
            return {"count": self.count}

        def restore(self, state):
            self.count = state["count"]

    def run(**more) -> SearchResult:
        return run_search(
            name="x",
            sampler=Counting(problem, seed=0, offspring=6),
            scorer=Noisy(problem),
            plan=Plan.of(generations=more.pop("generations", 5), stages=STAGES),
            dense={"kl": 0.0, "ppl": 1.0},
            listeners=[],
            **more,
        )

    path = tmp_path / "state.json"
    whole = timeless(problem, run())
    run(generations=2, state_path=path)
    assert json.loads(path.read_text().splitlines()[-1])["sampler"] == {"count": 3}
    assert timeless(problem, run(state=SearchState.read(path, problem=problem))) == whole


def test_a_finished_search_can_be_made_longer(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    short = search(problem, generations=2, state_path=path)
    again = search(problem, generations=2, state=SearchState.read(path, problem=problem))
    longer = search(problem, state=SearchState.read(path, problem=problem), state_path=path)
    assert timeless(problem, again) == timeless(problem, short)
    assert timeless(problem, longer) == timeless(problem, search(problem))
    assert SearchState.read(path, problem=problem).generation == GENERATIONS + 1


def test_a_search_is_the_same_with_and_without_a_file(problem: Problem, tmp_path: Path) -> None:
    assert timeless(problem, search(problem)) == timeless(problem, search(problem, state_path=tmp_path / "state.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_listeners_receive_what_was_done_before(problem: Problem, tmp_path: Path) -> None:
    class Recorded:
        def __init__(self) -> None:
            self.events: list = []

        def on_event(self, event) -> None:
            self.events.append(event)

    recorded = Recorded()
    state = stopped(problem, 2, tmp_path / "state.json")
    search(problem, state=state, listeners=[recorded])
    start, *records = recorded.events
    assert isinstance(start, SearchStarted) and start.continued == 3
    assert [record.generation for record in records] == list(range(GENERATIONS + 1))


def test_time_goes_on_where_it_stopped(problem: Problem, tmp_path: Path) -> None:
    state = stopped(problem, 2, tmp_path / "state.json")
    state.records[-1] = replace(state.records[-1], elapsed=1000.0)
    result = search(problem, state=state)
    assert result.seconds > 1000 and result.generations[3].elapsed > 1000


def test_a_dump_is_plain_json_and_comes_back_whole(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    result = search(problem, plan=PLANS["raced"], state_path=path)
    header, *lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in path.read_text().splitlines()
    ]
    back = SearchState.read(path, problem=problem)
    sampler = lines[-1].pop("sampler")
    assert back.dump() == {**header, "sampler": sampler, "generations": plain(lines)}
    for mine, other in zip(result.generations, back.records, strict=True):
        assert mine.elite == other.elite and mine.stages == other.stages and mine.validation == other.validation
        for one, two in zip(mine.candidates, other.candidates, strict=True):
            assert (one.genome == two.genome).all() and one.genome.dtype == two.genome.dtype
            assert (one.slot, one.scores, one.parent, one.duplicate_of) == (
                two.slot,
                two.scores,
                two.parent,
                two.duplicate_of,
            )


def test_scores_that_are_infinite_come_back(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    result = search(problem, state_path=path)
    infinite = [[np.inf in c.scores.values() for c in r.candidates] for r in result.generations]
    back = SearchState.read(path, problem=problem)
    assert any(map(any, infinite))
    assert [[np.inf in c.scores.values() for c in r.candidates] for r in back.records] == infinite
    assert "Infinity" not in path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "random"}, r"another sampler \(\"evopress\", now \"random\"\)"),
        ({"sampler": "several parents"}, r"another seed \(3, now 5\)"),
        ({"plan": {"racing": 0.1, "final": True}}, r"another survival \(\"ScoreAll\(\)\", now"),
        ({"plan": {"surrogate": 0.1}}, r"another screening"),
        ({"identity": {"store": "new"}}, r"another store \(\"old\", now \"new\"\); set it as it was, or start"),
        ({"identity": {}}, r"another store \(\"old\", now null\)"),
    ],
)
def test_a_state_of_another_search_is_refused(problem: Problem, tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "state.json"
    same = {"identity": {"store": "old"}}
    search(problem, generations=1, state_path=path, **same)
    with pytest.raises(EvosweepError, match=message) as error:
        search(problem, **{**same, **change}, state=SearchState.read(path, problem=problem))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"offspring": 11}, {"offspring": 13}, {"max_flips": 1}])
def test_a_sampler_with_other_settings_is_noticed(problem: Problem, tmp_path: Path, settings: dict) -> None:
    state = stopped(problem, 2, tmp_path / "state.json")
    assert state is not None
    with pytest.raises(
        EvosweepError, match="does not propose what this search state holds of generation 1: its settin"
    ):
        run_search(
            name="x",
            sampler=EvoPressSampler(problem, **{"seed": 3, "offspring": 12, **settings}),
            scorer=Noisy(problem),
            plan=Plan.of(generations=GENERATIONS, stages=STAGES),
            dense={"kl": 0.0, "ppl": 1.0},
            listeners=[],
            state=state,
        )


def plain(lines: list[dict]) -> list[dict]:
    """Return generations without the sampler's state, which each line of a file carries."""
    return [{key: value for key, value in line.items() if key != "sampler"} for line in lines]


def damaged(name: str, text: str) -> str:
    """Return a state's text with something wrong with it."""
    header, *lines = [json.loads(line) for line in text.splitlines()]
    if name == "cut short":
        return text[: len(text.splitlines()[0]) // 2]
    if name == "cut short inside":
        first, second, *rest = text.splitlines()
        return "\n".join([first, second[: len(second) // 2], *rest])
    if name == "empty":
        return ""
    if name == "a list":
        return "[]"
    if name == "older":
        header["version"] = VERSION - 1
    if name == "newer":
        header["version"] = VERSION + 1
    if name == "no version":
        del header["version"]
    if name == "a generation is missing":
        del lines[1]
    if name == "a genome is short":
        lines[1]["elite"] = "11"
    if name == "a level is unknown":
        lines[1]["candidates"]["genomes"][0] = "z" * 12
    if name == "a column is missing":
        del lines[1]["candidates"]["slots"]
    return "\n".join(json.dumps(line) for line in (header, *lines))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut short", "is no JSON or was cut short; remove it, or start the search anew"),
        ("empty", "is no JSON or was cut short"),
        ("a list", "no search state"),
        ("older", f"has version {VERSION - 1}, this evosweep reads version {VERSION}; continue it with the evosweep"),
        ("newer", f"has version {VERSION + 1}, this evosweep reads"),
        ("no version", "has version null"),
        ("a generation is missing", "damaged .*generation 1 is missing"),
        ("a genome is short", "damaged .*'11' is no genome of 12 units"),
        ("a level is unknown", "damaged .*is no genome"),
        ("a column is missing", "damaged .*slots"),
        ("cut short inside", "is no JSON or was cut short"),
    ],
)
def test_a_file_that_is_no_state_is_one_line_that_names_it(
    problem: Problem, tmp_path: Path, name: str, message: str
) -> None:
    path = tmp_path / "state.json"
    search(problem, generations=2, state_path=path)
    path.write_text(damaged(name, path.read_text()))
    with pytest.raises(EvosweepError, match=message) as error:
        SearchState.read(path, problem=problem)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("sampler", ["evopress", "tpe"])
def test_a_last_line_that_was_cut_short_is_left_out(problem: Problem, tmp_path: Path, sampler: str) -> None:
    path = tmp_path / "state.jsonl"
    whole = timeless(problem, search(problem, sampler, state_path=path))
    text = path.read_text()
    path.write_text(text[: -len(text.splitlines()[-1]) // 2])
    state = SearchState.read(path, problem=problem)
    assert state.cut and state.generation == GENERATIONS
    assert timeless(problem, search(make_problem(), sampler, state=state, state_path=path)) == whole
    again = SearchState.read(path, problem=problem)  # what was torn is gone from the file
    assert not again.cut and again.generation == GENERATIONS + 1


def test_a_generation_adds_one_line_to_the_file(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    stopped(problem, 2, path)
    before = plain([json.loads(line) for line in path.read_text().splitlines()])
    search(problem, state=SearchState.read(path, problem=problem), state_path=path)
    after = plain([json.loads(line) for line in path.read_text().splitlines()])
    assert len(before) == 4 and len(after) == GENERATIONS + 2 and after[:4] == before


def test_a_missing_file_is_said(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(EvosweepError, match="cannot be read: No such file"):
        SearchState.read(tmp_path / "state.json", problem=problem)


def test_a_state_of_another_problem_is_refused(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    search(problem, generations=1, state_path=path)
    other = make_problem(problem.budget + 450)
    with pytest.raises(EvosweepError, match=r"of another problem .* other units, levels, costs or budget"):
        SearchState.read(path, problem=other)
    with pytest.raises(EvosweepError, match="of another problem"):
        search(other, state=SearchState.read(path, problem=problem))


@pytest.mark.parametrize("levels", [2, 36, 37, 70])
def test_any_genome_survives_as_text(levels: int) -> None:
    units = tuple(Unit(f"u{n}", 10, n, ladder(10, tuple(range(2, 2 + levels)))) for n in range(9))
    problem = Problem(units=units, budget=10**6)
    rng = np.random.default_rng(levels)
    for _ in range(20):
        genome = rng.integers(0, levels, 9)
        assert (genome_from_text(problem, genome_to_text(problem, genome)) == genome).all()
