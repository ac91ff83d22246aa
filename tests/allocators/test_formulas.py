"""EMQ's search over formulas of proxies."""

import numpy as np
import pytest

from evosweep.allocators.formulas import Bench, Branch, Formula, Screening, evolved
from evosweep.core.errors import EvosweepError

UNITS = 30
SIZES = np.full(UNITS, 4)


@pytest.fixture(scope="module")
def proxies() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    errors = rng.lognormal(size=(UNITS, 1)) * 4.0 ** -np.arange(4)
    trace = np.repeat(rng.lognormal(sigma=2, size=(UNITS, 1)), 4, axis=1)
    noise = np.repeat(rng.lognormal(size=(UNITS, 1)), 4, axis=1)
    return {"error": errors, "trace": trace, "noise": noise}


@pytest.fixture(scope="module")
def bench(proxies: dict[str, np.ndarray]) -> Bench:
    """The true KL is Σ √trace · error, with one percent of noise."""
    rng = np.random.default_rng(1)
    genomes = rng.integers(0, 4, (120, UNITS))
    true = np.sqrt(proxies["trace"]) * proxies["error"]
    kl = true[np.arange(UNITS), genomes].sum(axis=1) * rng.normal(1, 0.01, 120)
    return Bench(genomes, kl)


def test_it_finds_a_formula_that_ranks_as_the_kl_does(proxies, bench: Bench) -> None:
    alone = bench.correlation("error", proxies["error"])
    found = evolved(proxies, SIZES, bench, seed=0)
    assert found.held_out > 0.97 > alone and found.fitted > 0.98
    assert "error" in str(found.formula) and "trace" in str(found.formula)
    assert str(found.formula) in str(found) and f"{found.held_out:.3f} on others" in str(found)


def test_it_is_the_same_every_time(proxies, bench: Bench) -> None:
    first, again, other = (evolved(proxies, SIZES, bench, seed=seed, iterations=50) for seed in (3, 3, 4))
    assert first == again and str(first.formula) != str(other.formula)


def test_more_iterations_are_no_worse(proxies, bench: Bench) -> None:
    scores = [evolved(proxies, SIZES, bench, seed=1, iterations=count).fitted for count in (1, 50, 400)]
    assert scores == sorted(scores) and scores[0] < scores[-1]


def test_spearman_is_that_of_ranks(proxies, bench: Bench) -> None:
    scores = bench.scores(proxies["error"])
    ranks = [np.argsort(np.argsort(values)) for values in (scores, bench.kl)]
    assert bench.correlation("error", proxies["error"]) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_constant_proxy_is_refused_by_name(proxies, bench: Bench) -> None:
    with pytest.raises(EvosweepError, match="proxy noise is constant over the 120 scored allocations"):
        bench.correlation("noise", proxies["noise"])
    with pytest.raises(EvosweepError, match="proxy odd is not a finite number"):
        bench.correlation("odd", np.full((UNITS, 4), np.nan))


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        (Formula(Branch("noise", "", ""), Branch("trace", "", ""), "+", ""), "constant"),
        (Formula(Branch("error", "neg", ""), Branch("trace", "", ""), "*", ""), "falls the wrong way"),
        (Formula(Branch("huge", "square", "square"), Branch("error", "", ""), "*", ""), "overflows"),
    ],
)
def test_screening_refuses(proxies, bench: Bench, formula: Formula, why: str) -> None:
    screening = Screening({**proxies, "huge": proxies["error"] * 1e200}, SIZES, bench)
    assert screening.judged(formula) is None, why


def test_screening_refuses_a_formula_that_ranks_like_another(proxies, bench: Bench) -> None:
    screening = Screening(proxies, SIZES, bench)
    plain = Formula(Branch("error", "", ""), Branch("trace", "", ""), "*", "")
    assert screening.judged(plain) == bench.correlation("error * trace", proxies["error"] * proxies["trace"])
    assert screening.judged(Formula(plain.right, plain.left, "*", "")) is None


def test_proxies_that_say_nothing(bench: Bench, proxies) -> None:
    with pytest.raises(EvosweepError, match="no formula of proxies passes EMQ's screening"):
        evolved({"flat": np.ones((UNITS, 4))}, SIZES, bench, seed=0)
    with pytest.raises(EvosweepError, match="at least 4 scored allocations"):
        evolved(proxies, SIZES, bench.rows(slice(0, 3)), seed=0)


def test_a_formula_is_what_it_says(proxies) -> None:
    formula = Formula(Branch("error", "square", "log"), Branch("trace", "", "sqrt"), "/", "neg")
    assert str(formula) == "neg(log(square(error)) / sqrt(trace))"
    expected = -2 * np.log(proxies["error"]) / np.sqrt(proxies["trace"])
    assert formula.table(proxies) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    shares = Formula(Branch("error", "", "share"), Branch("noise", "", "centred"), "max", "").table(proxies)
    noise = proxies["noise"] - proxies["noise"].mean(axis=0)
    assert shares == pytest.approx(np.maximum(proxies["error"] / proxies["error"].sum(axis=0), noise))
