"""Recipes are read by the tools that they are for, each in an environment of its own."""

import numpy as np
import pytest

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.recipe import Recipe
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.engines.environment import run_engine

WIDTHS = [2, 3, 4, 8]


@pytest.fixture(scope="module")
def recipes(anatomy, splits, loaded, tmp_path_factory):
    """Every recipe of one allocation, the dense model beside them, and the bits that each layer shall have.

    AutoRound gets its 8 bits without zeros, as it refuses them otherwise; no other tool needs ``nearest`` here.
    """
    store = StoreBuilder().open(
        plan_store(anatomy, GPTQ(bits=WIDTHS, group=32)), splits["calibration"], model_name="tiny"
    )
    problem = Budget(bits_per_weight=16).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(problem.units)) % len(WIDTHS)
    folder = tmp_path_factory.mktemp("recipes")
    Recipe(nearest=True).export(
        genome,
        problem=problem,
        evaluator=Evaluator(anatomy=anatomy, store=store, splits=splits),
        loaded=loaded,
        folder=folder / "recipes",
    )
    loaded.model.save_pretrained(folder / "dense")
    loaded.tokenizer.save_pretrained(folder / "dense")
    rows = {slot.name: slot.shape[0] for slot in anatomy.slots}
    return folder, rows, {unit.name: WIDTHS[level] for unit, level in zip(problem.units, genome, strict=True)}


@pytest.mark.parametrize(
    ("tool", "engine"),
    [("mlx_lm", "mlx"), ("auto_round", "auto_round"), ("gptqmodel", "gptqmodel"), ("torchao", "gptqmodel")],
)
def test_the_tool_gives_every_layer_its_bits(recipes, tool: str, engine: str, tmp_path) -> None:
    folder, rows, expected = recipes
    if tool == "auto_round":  # it leaves layers as they are whose sides 32 does not divide
        expected = {path: bits for path, bits in expected.items() if rows[path] % 32 == 0}
    found = run_engine(engine, "read_recipe", tool, folder / "recipes", folder / "dense", tmp_path / "out")
    assert {path: bits for path, bits in found.items() if bits != 16} == expected
