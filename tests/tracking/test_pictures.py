import time

import numpy as np
import pytest

from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Unit
from evosweep.tracking.artifacts.heatmap import CELL, error_table, level_image, level_table
from evosweep.tracking.artifacts.spending import spent
from evosweep.tracking.palette import level_styles, short_labels

JOINT = ["2bit", "75%@4bit", "62.5%@3bit", "37.5%@3bit", "3bit", "37.5%@4bit", "4bit", "dense"]


def joint(blocks: int) -> Problem:
    ladder = tuple(Level(name, 1000 + 100 * index) for index, name in enumerate(JOINT))
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    units = tuple(Unit(f"layers.{block}.{kind}", 500, block, ladder) for block in range(blocks) for kind in kinds)
    return Problem(units, budget=10**7)


def test_labels_are_short_and_different() -> None:
    assert short_labels(JOINT) == ["2", "75/4", "62/3", "38/3", "3", "38/4", "4", "dense"]
    assert short_labels(["62.5%", "62.4%"]) == ["62.5", "62.4"]
    assert short_labels(["a very long name", "another long name"]) == ["0", "1"]


def test_a_level_has_one_colour_of_its_own_in_every_picture() -> None:
    styles = level_styles(joint(3))
    assert list(styles) == JOINT and len({style.colour for style in styles.values()}) == len(JOINT)
    for style in styles.values():
        contrast = abs(sum(style.colour) - sum(style.ink)) / 3
        assert contrast > 60, style
    problem = joint(3)
    genome = np.arange(15) % 8
    pixels = level_image(problem, problem.decode(genome))
    found = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert {style.colour for style in styles.values()} <= found


def test_pictures_of_two_generations_differ_in_their_cells_alone_and_are_made_quickly() -> None:
    problem = joint(30)
    first, second = problem.uniform(), problem.uniform()
    second[7] = (second[7] + 1) % 8  # third layer of the second block
    before = level_image(problem, problem.decode(first))
    began = time.perf_counter()
    after = level_image(problem, problem.decode(second))
    assert time.perf_counter() - began < 0.5
    rows, columns = np.nonzero((before != after).any(axis=2))
    assert 0 < np.ptp(rows) < CELL and 0 < np.ptp(columns) < CELL


def test_a_block_without_a_layer_is_empty(problem: Problem) -> None:
    names, rows, blocks = level_table(problem, problem.decode(problem.uniform()))
    assert blocks == [0, 1, 2, 3] and len(names) == len(rows)
    assert sum(name == "3bit" for line in names for name in line) == len(problem.units)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_ladders_of_any_length_have_styles(count: int) -> None:
    ladder = tuple(Level(f"{index}%", 100 + index) for index in range(count))
    problem = Problem((Unit("layers.0.mlp", 100, 0, ladder),), budget=10**6)
    assert len(level_styles(problem)) == count
    assert level_image(problem, problem.decode(problem.uniform())).dtype == np.uint8


def test_sensitivities_stand_where_the_levels_do() -> None:
    ladder = (Level("2bit", 1000, relative_error=0.5), Level("3bit", 1500, relative_error=0.1))
    units = [Unit(f"layers.{block}.mlp.up_proj", 500, block, ladder) for block in range(3)]
    units.append(Unit("layers.2.mlp.down_proj", 500, 2, (Level("2bit", 1000),)))
    problem = Problem(tuple(units), budget=1500 * 3 + 1000)
    assert error_table(problem) == [[0.1, 0.1, 0.1], [None, None, None]]


def test_bits_are_summed_over_a_group(problem: Problem) -> None:
    genome = problem.uniform()
    by_block = spent(problem, genome, lambda unit: unit.block)
    assert list(by_block) == [0, 1, 2, 3]
    weights = {block: sum(unit.numel for unit in problem.units if unit.block == block) for block in by_block}
    assert sum(by_block[block] * weights[block] for block in by_block) == pytest.approx(problem.cost(genome))
