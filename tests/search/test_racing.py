import numpy as np
import pytest
from scipy import stats

from evosweep.core.errors import SettingError
from evosweep.search.racing import Look, Racing, pocock, segments, students


def losses(shifts: np.ndarray, *, windows: int = 2, tokens: int = 255, seed: int = 0) -> np.ndarray:
    """Losses that share their tokens' difficulty and differ by a shift and a little noise of their own."""
    rng = np.random.default_rng(seed)
    shared = rng.gamma(2.0, 1.0, (1, windows, tokens))
    return shared + shifts[:, None, None] + rng.normal(0, 0.2, (len(shifts), windows, tokens))


def test_looks_double_and_end_with_all() -> None:
    assert Racing(0.05).looks(5, 2048) == [Look(1, 512), Look(1, 2048), Look(2, 2048), Look(4, 2048), Look(5, 2048)]
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
