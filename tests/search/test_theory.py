import numpy as np

from benchmarks.theory import generations_needed


def test_the_best_choice_is_found_in_about_as_many_generations_as_the_theory_says() -> None:
    """k(n−k)/λ generations up to a logarithm; eight times as many offspring need several times fewer."""
    few = [generations_needed(units=24, upper=6, offspring=1, seed=seed) for seed in range(8)]
    many = [generations_needed(units=24, upper=6, offspring=8, seed=seed) for seed in range(8)]
    assert np.mean(few) < 6 * 18 * np.log(24)
    assert 3 < np.mean(few) / np.mean(many) < 16
