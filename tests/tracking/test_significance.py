"""Paired tests over windows say what is there, and what is not."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from evosweep.tracking.significance import BY_WINDOW, against_uniform, found_sentences, in_words, paired


def test_a_small_difference_in_every_window_is_found() -> None:
    hard = np.random.default_rng(0).normal(1.0, 0.5, 32)  # windows differ far more than the two results do
    found = paired(hard - 0.05 + np.random.default_rng(1).normal(0, 0.01, 32), hard)
    assert found.better is True and found.probability is not None and found.probability < 1e-10
    assert found.sentence(name="a", than="b").startswith("a is better than b: KL ")


def test_the_probability_is_the_paired_one() -> None:
    first, second = [0.3, 0.5, 0.4, 0.9], [0.4, 0.45, 0.6, 1.0]
    assert paired(first, second).probability == pytest.approx(float(ttest_rel(first, second).pvalue))


def test_noise_is_no_difference() -> None:
    rng = np.random.default_rng(3)
    found = paired(rng.normal(1, 0.2, 20), rng.normal(1, 0.2, 20))
    assert found.better is None and "no difference found" in found.sentence(name="a", than="b")


def test_a_loss_is_called_one() -> None:
    assert "is worse than" in paired([0.5, 0.61, 0.7], [0.4, 0.5, 0.6]).sentence(name="a", than="b")


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0])])
def test_what_cannot_be_tested_has_no_probability(first: list[float], second: list[float]) -> None:
    found = paired(first, second)
    assert found.probability is None and "cannot be told apart" in found.sentence(name="a", than="b")


def test_different_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 windows"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_only_results_at_one_budget_and_on_one_text_are_compared() -> None:
    uniform = {"sampler": "uniform", "budget": "a", "text": "t", "size_mb": 1.0, "bits_per_weight": 3.0}
    uniform[BY_WINDOW] = [0.5, 0.6, 0.7]
    best = {**uniform, "sampler": "evopress", BY_WINDOW: [0.4, 0.52, 0.58]}
    assert "evopress (1.0 MB, 3.000 bits) is better than uniform" in (against_uniform([uniform, best], best) or "")
    assert against_uniform([{**uniform, "budget": "b"}, best], best) is None
    assert against_uniform([{**uniform, "text": "other"}, best], best) is None
    assert against_uniform([best], best) is None
    assert (against_uniform([uniform, best], best) or "").endswith(").")
    larger = {**best, "size_mb": 1.5}
    smaller = "Uniform is 0.5 MB smaller, so part of the difference is size."
    assert (against_uniform([uniform, larger], larger) or "").endswith(smaller)


def test_a_search_says_what_it_beat_and_what_it_lost_to() -> None:
    won = {**paired([0.4, 0.51, 0.63], [0.5, 0.6, 0.7]).row(), "bits_per_weight": 3.297}
    lost = {**paired([0.4, 0.51, 0.63], [0.3, 0.4, 0.53]).row(), "bits_per_weight": 3.25}
    first, second = found_sentences("evopress", {"uniform": won, "start": lost})
    assert first.startswith("evopress is better than uniform (3.297 bits): KL 0.513 against 0.6 on 3 windows")
    assert second.startswith("evopress is worse than its own start (3.250 bits): ")
    assert in_words(won).startswith("better, p = ") and in_words(lost).startswith("worse, p = ")
    same = {**paired([0.4, 0.5], [0.4, 0.5]).row(), "bits_per_weight": 3.25}
    assert found_sentences("ilp", {"start": same}) == ["ilp ended where it started."]
    assert in_words(same) == "no difference found" and found_sentences("uniform", {"start": same}) == []
