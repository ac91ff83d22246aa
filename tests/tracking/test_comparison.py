import numpy as np
import pytest

from evosweep.tracking import comparison
from evosweep.tracking.artifacts.compared import FIGURES, front


def row(sampler: str, seed: int, kl: float, *, budget: str = "as_uniform=3", bits: float = 3.3, steps: int = 1, **more):
    history = [{"tokens": 100 * n, "kl": kl + steps - n, "ppl": 9.0} for n in range(1, steps + 1)]
    return {
        "sampler": sampler,
        "seed": seed,
        "budget": budget,
        "overrides": [],
        "kl": kl,
        "ppl": 10 * kl,
        "bits_per_weight": bits,
        "size_mb": 56 + 13 * bits,
        "tokens": 100,
        "seconds": 2.0,
        "dense_ppl": 5.0,
        "history": history,
        **more,
    }


CLEAR = [row("evopress", s, kl, steps=3) for s, kl in enumerate((0.60, 0.61, 0.62))]
WORSE = [row("ilp", s, kl) for s, kl in enumerate((0.70, 0.71, 0.69))]
NEAR = [row("warm", s, kl) for s, kl in enumerate((0.60, 0.63, 0.625))]


def test_means_over_seeds_best_first() -> None:
    table = {line[1]: line for line in comparison.table(WORSE + CLEAR)}
    assert list(table) == ["evopress", "ilp"]
    assert table["evopress"][2] == 3 and table["evopress"][4] == pytest.approx(0.61)
    assert table["evopress"][5] == pytest.approx(np.std([0.60, 0.61, 0.62], ddof=1))


def test_a_lead_counts_only_beyond_seed_noise() -> None:
    words = {line[1]: line[-1] for line in comparison.table(WORSE + CLEAR + NEAR)}
    assert words["evopress"] == "best"
    assert words["ilp"].startswith("behind (p = ") and words["warm"].startswith("within seed noise (p = ")


def test_one_seed_says_nothing_about_noise() -> None:
    table = comparison.table([CLEAR[0], WORSE[0]])
    assert table[0][5] is None and table[1][-1] == "behind (too few seeds to tell noise)"


def test_what_does_not_vary_is_compared_as_it_is() -> None:
    fixed = [row("uniform", s, 0.8) for s in range(2)] + [row("owl", s, 0.9) for s in range(2)]
    assert [line[-1] for line in comparison.table(fixed)] == ["best", "behind"]


def test_budgets_are_compared_apart_and_settings_named() -> None:
    rows = [
        *CLEAR,
        row("evopress", 0, 0.3, budget="as_uniform=4", bits=4.3, overrides=["budget.as_uniform=4"]),
        row("ilp", 0, 0.7, overrides=["search.racing=0.2"]),
    ]
    found = comparison.entries(rows)
    assert [(entry.budget, entry.name) for entry in found] == [
        ("as_uniform=3", "evopress"),
        ("as_uniform=3", "ilp search.racing=0.2"),
        ("as_uniform=4", "evopress"),
    ]
    table, _, explained = comparison.markdown(rows).partition("\n\n")
    assert table.count("\n") == 4 and "sorted by mean validation KL" in explained


def test_equal_settings_are_one_entry_and_different_ones_never() -> None:
    rows = [
        row("evopress", 0, 0.60, identity="a1", name="monday", overrides=["experiment=monday"]),
        row("evopress", 1, 0.62, identity="a1", name="tuesday", overrides=["experiment=tuesday"]),
        row("evopress", 0, 0.50, identity="b2", name="monday", overrides=["experiment=monday"]),
        row("ilp", 0, 0.70, identity="c3", name="monday", overrides=["experiment=monday"]),
    ]
    found = comparison.entries(rows)
    assert [([member["kl"] for member in entry.rows], entry.name) for entry in found] == [
        ([0.50], "evopress experiment=monday"),
        ([0.60, 0.62], "evopress"),
        ([0.70], "ilp experiment=monday"),
    ]


def test_entries_that_no_override_tells_apart_show_experiment_or_settings() -> None:
    found = comparison.entries(
        [
            row("evopress", 0, 0.5, identity="a1b2c3d4", name="monday"),
            row("evopress", 0, 0.6, identity="b2c3d4e5", name="tuesday"),
            row("ilp", 0, 0.7, identity="c3d4e5f6", name="monday"),
            row("ilp", 0, 0.8, identity="d4e5f6a7", name="monday"),
        ]
    )
    assert [entry.name for entry in found] == [
        "evopress (monday)",
        "evopress (tuesday)",
        "ilp (c3d4e5)",
        "ilp (d4e5f6)",
    ]


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path) -> None:
    other = [row(first["sampler"], 0, 0.2, budget="as_uniform=4", bits=4.3) for first in (CLEAR[0], WORSE[0])]
    drawn = {path.name: path for draw in FIGURES for path in draw([*CLEAR, *WORSE, *other], tmp_path)}
    assert set(drawn) == {"convergence.png", "size_quality.png", "standings.png"}
    assert all(path.stat().st_size > 10_000 for path in drawn.values())
    assert [path for draw in FIGURES for path in draw(WORSE, tmp_path)] == []


def test_noise_of_search_and_of_calibration_are_told_apart() -> None:
    drift = {1: 0.0, 2: 0.1, 3: -0.1}
    near = [
        row("evopress", seed, 0.6 + drift[draw] + 0.002 * seed, calibration_seed=draw)
        for draw in drift
        for seed in range(3)
    ]
    far = [
        row("ilp", seed, 0.62 + 0.9 * drift[draw] + 0.002 * seed, calibration_seed=draw)
        for draw in drift
        for seed in range(3)
    ]
    found = {line[1]: dict(zip(comparison.COLUMNS, line, strict=True)) for line in comparison.table(near + far)}
    assert found["evopress"]["seeds"] == 9
    assert found["evopress"]["kl_sd_search"] == pytest.approx(0.002)
    assert found["evopress"]["kl_sd_calibration"] == pytest.approx((0.01 - 0.002**2 / 3) ** 0.5)
    assert found["ilp"]["verdict"].startswith("no difference found (p = ") or found["ilp"]["verdict"].startswith(
        "behind"
    )
    assert "over 3 calibrations" in found["ilp"]["verdict"]
    text = comparison.markdown(near + far)
    assert "| search sd | calibration sd |" in text and "| 0.0020 | 0.1000 |" in text


def test_a_lead_in_every_calibration_counts_though_calibrations_differ_more() -> None:
    rows = []
    for draw, level in ((1, 0.5), (2, 0.7), (3, 0.9)):
        rows.append(row("evopress", 0, level, calibration_seed=draw))
        rows.append(row("ilp", 0, level + 0.02 + 0.001 * draw, calibration_seed=draw))
    found = {line[1]: line[-1] for line in comparison.table(rows)}
    assert found["ilp"].startswith("behind (p = ") and found["ilp"].endswith(" over 3 calibrations)")


def test_single_searches_are_compared_window_by_window() -> None:
    best = row("evopress", 0, 0.55, text="t", kl_by_window=[0.5, 0.6, 0.55])
    near = row("ilp", 0, 0.56, text="t", kl_by_window=[0.53, 0.56, 0.59])
    far = row("owl", 0, 0.66, text="t", kl_by_window=[0.6, 0.71, 0.67])
    found = {line[1]: line[-1] for line in comparison.table([best, near, far])}
    assert found["ilp"].startswith("no difference found (p = ")
    assert found["owl"].startswith("behind (p = ") and found["owl"].endswith(" over windows, one seed)")


def test_the_front_holds_what_no_smaller_run_beats() -> None:
    points = [(100.0, 0.7), (100.0, 0.6), (107.0, 0.65), (114.0, 0.2), (120.0, 0.2)]
    assert front([{"size_mb": size, "kl": kl} for size, kl in points]) == [(100.0, 0.6), (114.0, 0.2)]
