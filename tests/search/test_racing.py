import numpy as np
import pytest
from scipy import stats

from evosweep.core.errors import SettingError
from evosweep.search.racing import (
    ALIKE,
    SEGMENT,
    Look,
    Racing,
    field_boundary,
    paired_scores,
    pocock,
    segments,
    students,
)
from evosweep.search.survival import Race


def losses(shifts: np.ndarray, *, windows: int = 2, tokens: int = 255, seed: int = 0) -> np.ndarray:
    """Losses that share their tokens' difficulty and differ by a shift and a little noise of their own.

    The noise of a window's segments is correlated as it is in real losses.
    """
    rng = np.random.default_rng(seed)
    shared = rng.gamma(2.0, 1.0, (1, windows, tokens))
    own = rng.normal(0, 0.2, (len(shifts), windows, tokens))
    whole = rng.normal(0, 0.2 * (ALIKE / (1 - ALIKE) / SEGMENT) ** 0.5, (len(shifts), windows, 1))
    return shared + shifts[:, None, None] + own + whole


def test_looks_double_and_end_with_all() -> None:
    assert Racing(0.05).looks(5, 2048) == [Look(1, 2048), Look(2, 2048), Look(4, 2048), Look(5, 2048)]
    assert Racing(0.05).looks(1, 2048) == [Look(1, 512), Look(1, 2048)]
    assert Racing(0.05).looks(1, 256) == [Look(1, 256)]
    assert Racing(0.05).looks(4, 256) == [Look(1, 256), Look(2, 256), Look(4, 256)]


def test_the_clearly_worse_are_given_up_and_the_best_never() -> None:
    shifts = np.array([0.0, 0.5, 0.01, 0.6, 0.02, 0.7])
    out = Racing.excluded(losses(shifts), 3, boundary=2.0)
    assert out.tolist() == [False, True, False, True, False, True]


def test_with_no_more_than_the_survivors_nobody_is_given_up() -> None:
    assert not Racing.excluded(losses(np.array([0.0, 9.0])), 2, boundary=0.1).any()


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_equals_are_given_up_as_often_as_the_error_says(error: float) -> None:
    racing, windows = Racing(error), 16
    looks = racing.looks(windows, 256)
    boundary, given_up = racing.boundary(looks), 0
    for seed in range(1000):
        seen = losses(np.zeros(2), windows=windows, tokens=255, seed=seed)
        seen[1] += 1e-9  # so that, before anything is seen, it is settled who is compared with whom
        found = [seen[:, : look.windows] for look in looks[:-1]]
        behind = [each for each in found if segments(each)[1].mean() > segments(each)[0].mean()]
        given_up += any(Racing.excluded(each, 1, boundary=boundary)[1] for each in behind)
    assert given_up / 1000 == pytest.approx(error, abs=0.035)


SHAPES = {"8 of 64": (64, 8), "2 of 20": (20, 2), "1 of 10": (10, 1)}
SEQ_LEN, WINDOWS, RACES = 2048, 4, 120


def field(effects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return losses that candidates with these relative effects have on one stage, each segment's mean at its tokens.

    As measured on 3-bit mutants of SmolLM2: difficulty shared by all; noise in proportion to it, of 3 to 15 %, more of
    it for whom more was changed, with heavy tails, correlated within a window.
    """
    shape = (len(effects), WINDOWS, SEQ_LEN // SEGMENT)
    difficulty = rng.gamma(8.0, 0.075, (1, *shape[1:]))
    level = 0.07 * np.exp(rng.normal(0, 0.4, (len(effects), 1, 1)))
    own = (1 - ALIKE) ** 0.5 * rng.standard_t(5, shape) / (5 / 3) ** 0.5
    noise = level * (own + ALIKE**0.5 * rng.normal(size=(len(effects), WINDOWS, 1)))
    return np.repeat(difficulty * (1 + effects[:, None, None] + noise), SEGMENT, axis=2)


def race(values: np.ndarray, *, survivors: int, error: float) -> tuple[np.ndarray, float]:
    """Run a real race over losses; return who was given up and the share of tokens that was saved."""

    class Recorded:
        seq_len = SEQ_LEN

        def losses(self, genomes, *, windows: slice, length: int, **_):
            return values[genomes[:, 0], windows, : length - 1]

        def reduce(self, loss: float) -> float:
            return loss

    outcome = Race(Racing(error)).run(
        np.arange(len(values))[:, None],
        scorer=Recorded(),
        generation=1,
        stage=0,
        tokens=WINDOWS * SEQ_LEN,
        survivors=survivors,
    )
    return outcome.given_up, 1 - outcome.tokens / (len(values) * WINDOWS * SEQ_LEN)


@pytest.mark.parametrize("spread", ["none", "even", "measured"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_true_survivor_of_a_field_is_given_up_no_more_often_than_promised(shape: str, spread: str) -> None:
    candidates, survivors = SHAPES[shape]
    lost, saved = 0, []
    for seed in range(RACES):
        rng = np.random.default_rng(seed)
        effects = {
            "none": np.zeros(candidates),
            "even": np.linspace(0, 0.08, candidates),
            "measured": np.sort(0.05 * np.exp(rng.normal(0, 0.9, candidates))),
        }[spread]
        given_up, share = race(field(effects, rng), survivors=survivors, error=0.2)
        lost += given_up[survivors - 1]
        saved.append(share)
    assert lost / RACES < 0.2 + 2 * (0.2 * 0.8 / RACES) ** 0.5
    assert np.mean(saved) > (0.05 if spread == "none" else 0.2)


def test_in_a_field_of_equals_the_boundary_s_level_is_the_promised_one() -> None:
    rng, fractions = np.random.default_rng(1), (0.25, 0.5)
    boundary = field_boundary(fractions, 0.2, competitors=40, survivors=5)
    steps = np.sqrt(np.diff((0.0, *fractions)))
    paths = np.cumsum(rng.normal(size=(3000, 41, 2)) * steps, axis=2)
    behind = (paths[:, :1] - paths[:, 1:]) / np.sqrt(2 * np.array(fractions)) > boundary
    assert (behind.sum(axis=1) >= 5).any(axis=1).mean() == pytest.approx(0.2, abs=0.025)


def test_more_competitors_ask_for_more_and_more_survivors_for_less() -> None:
    looks = Racing(0.1).looks(4, 512)
    by_field = [Racing(0.1).boundary(looks, candidates=n, survivors=1) for n in (2, 4, 9, 33, 129)]
    assert by_field == sorted(by_field) and by_field[0] == pytest.approx(pocock((0.25, 0.5), 0.1))
    by_survivors = [Racing(0.1).boundary(looks, candidates=65, survivors=k) for k in (1, 2, 8, 32)]
    assert by_survivors == sorted(by_survivors, reverse=True)
    assert Racing(0.1).boundary(looks, candidates=3, survivors=3) == np.inf


def test_paired_scores_are_t_statistics() -> None:
    samples = np.random.default_rng(0).gamma(2.0, 1.0, (4, 30)) + 1e4
    found = paired_scores(samples)
    for row, column in ((0, 1), (3, 2)):
        assert found[row, column] == pytest.approx(stats.ttest_rel(samples[row], samples[column]).statistic)
    assert (np.diag(found) == 0).all()


@pytest.mark.parametrize(
    ("looks", "boundary"),
    [(1, 1.645), (2, 1.875), (3, 1.992), (5, 2.122)],  # Jennison and Turnbull's tables
)
def test_boundaries_of_evenly_spaced_looks_are_pococks(looks: int, boundary: float) -> None:
    fractions = tuple((place + 1) / looks for place in range(looks))
    assert pocock(fractions, 0.05) == pytest.approx(boundary, abs=0.005)


def test_one_look_alone_needs_no_correction_and_none_gives_nobody_up() -> None:
    assert pocock((0.3,), 0.2) == pytest.approx(stats.norm.ppf(0.8), abs=1e-3)
    assert Racing(0.2).boundary(Racing(0.2).looks(1, 256)) == np.inf


def test_segments_are_means_within_windows() -> None:
    values = np.arange(2 * 2 * 70, dtype=float).reshape(2, 2, 70)
    assert segments(values).shape == (2, 4)
    assert segments(values)[1, 2] == values[1, 1, :32].mean()


@pytest.mark.parametrize("degrees", [7, 30, 500])
def test_quantiles_are_students(degrees: int) -> None:
    for probability in (0.9, 0.95, 0.99):
        assert students(stats.norm.ppf(probability), degrees) == pytest.approx(
            stats.t.ppf(probability, degrees), rel=0.01
        )


@pytest.mark.parametrize("error", [0, 0.6, -1, "much"])
def test_an_error_level_is_a_small_probability(error) -> None:
    with pytest.raises(SettingError, match=r"racing"):
        Racing(error)
