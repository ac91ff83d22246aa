import numpy as np
import pytest
from scipy import stats

from evosweep.core.errors import SettingError
from evosweep.search.racing import Look, Racing, segments, t_quantile


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
    out = Racing(0.05).excluded(losses(shifts), 3, looks=4)
    assert out.tolist() == [False, True, False, True, False, True]


def test_with_no_more_than_the_survivors_nobody_is_given_up() -> None:
    assert not Racing(0.4).excluded(losses(np.array([0.0, 9.0])), 2, looks=1).any()


def test_equals_are_given_up_no_oftener_than_the_error_allows() -> None:
    given_up = sum(
        bool(Racing(0.05).excluded(losses(np.zeros(2), seed=seed), 1, looks=1).any()) for seed in range(1000)
    )
    # Either of two equals may lead, so both tails of the test count.
    assert given_up / 1000 < 0.13


def test_segments_are_means_within_windows() -> None:
    values = np.arange(2 * 2 * 70, dtype=float).reshape(2, 2, 70)
    assert segments(values).shape == (2, 4)
    assert segments(values)[1, 2] == values[1, 1, :32].mean()


@pytest.mark.parametrize("degrees", [7, 30, 500])
def test_quantiles_are_students(degrees: int) -> None:
    for probability in (0.9, 0.95, 0.99):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=0.01)


@pytest.mark.parametrize("error", [0, 0.6, -1, "much"])
def test_an_error_level_is_a_small_probability(error) -> None:
    with pytest.raises(SettingError, match=r"search\.racing"):
        Racing(error)
