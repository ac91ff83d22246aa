"""Mixtures in bad shapes, from the store over scoring to an export that is loaded again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.routed import met
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.families.configs import BLOCKS, small_config
from tests.mixtures.models import drawn, mixture, token_splits
from tests.mixtures.test_families import swapped_kl
from tests.models.test_dropping import NoTokenizer

SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "one expert a token": ("mixtral", {"num_experts_per_tok": 1}, 1),
    "all experts for every token": ("mixtral", {"num_experts_per_tok": 4}, 4),
    "one expert a token beside one that all go to": ("deepseek_v3", {"num_experts_per_tok": 1, "n_group": 1}, 1),
    "one expert in all": ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}, 1),
    "one that no token goes to": ("gpt_oss", {}, 2),
    "more experts than tokens": ("olmoe", {"num_experts": 96}, 2),
}


def unmet(model: torch.nn.Module) -> None:
    """Let no token of a gpt-oss go to expert 1 of any block."""
    for layer in model.model.layers:
        layer.mlp.router.bias.data[1] = -50.0


@pytest.mark.parametrize("shape", SHAPES)
def test_mixtures_in_bad_shapes(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, settings, chosen = SHAPES[shape]
    model = mixture(family, **settings)
    if "no token" in shape:
        unmet(model)
    anatomy, texts = Anatomy(model), token_splits()
    assert not anatomy.not_by_row
    store = StoreBuilder().open(
        plan_store(anatomy, GPTQ(bits=[2, 4], group=16)), texts["calibration"], model_name=family
    )
    experts = met(store.manifest.units)
    blocks = 1 if family == "deepseek_v3" else 2
    assert sum(expert.tokens for expert in experts) == blocks * chosen * 128
    never = {expert.name for expert in experts if not expert.tokens}
    assert bool(never) is (shape in {"one that no token goes to", "more experts than tokens"})
    assert all(np.isfinite(level.error) and level.error > 0 for unit in store.units for level in unit.levels)

    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    decoded: list[tuple[int, int]] = []
    make = evaluator.levels._make
    monkeypatch.setattr(evaluator.levels, "_make", lambda key: decoded.append(key) or make(key))
    genomes = np.random.default_rng(0).integers(0, 2, (4, len(store.units)))
    found = evaluator.score(genomes, split="search", windows=[0, 3], fitness=[KL()])["kl"]
    assert len(decoded) == len(set(decoded))  # once for the population, not once for each candidate
    if shape == "one that no token goes to":
        names = [unit.name for unit in store.units]
        assert not [names[unit] for unit, _ in decoded if ".experts.1." in names[unit]]
    expected = [swapped_kl(evaluator, genome, texts["search"].windows[[0, 3]]) for genome in genomes]
    assert found == pytest.approx(expected, rel=1e-5)

    facts = DenseSafetensors().export(
        genomes[0],
        problem=Budget(bits_per_weight=14).problem(store.units, fixed_bits=store.fixed_bits),
        evaluator=evaluator,
        folder=tmp_path / "model",
        loaded=LoadedModel(family, anatomy.model, NoTokenizer()),
    )
    assert facts["max_logit_difference"] < 1e-4


def test_a_router_is_a_unit_where_a_rule_names_it() -> None:
    model = drawn(transformers.AutoModelForCausalLM.from_config(small_config("hunyuan_v1_moe")).eval())
    anatomy, texts = Anatomy(model), token_splits()
    compressor = GPTQ(bits=[2, 4], group=16)
    assert not [unit for unit in plan_store(anatomy, compressor).units if unit.name.endswith("gate.wg")]
    plan = plan_store(anatomy, compressor, units=Units(include=["mlp.gate.wg"]))
    store = StoreBuilder().open(plan, texts["calibration"], model_name="hunyuan")
    routers = [index for index, unit in enumerate(store.units) if unit.name.endswith("gate.wg")]
    assert len(routers) == BLOCKS
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    genomes = np.ones((2, len(store.units)), dtype=np.int64)
    genomes[1, routers] = 0  # another router sends tokens elsewhere
    found = evaluator.score(genomes, split="search", windows=[0], fitness=[KL()])["kl"]
    expected = [swapped_kl(evaluator, genome, texts["search"].windows[[0]]) for genome in genomes]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_a_router_that_is_no_layer_cannot_be_named() -> None:
    with pytest.raises(SettingError, match=r"include must be patterns that match a layer, got '\*mlp.gate'"):
        plan_store(Anatomy(mixture("mixtral")), GPTQ(bits=[2, 4], group=16), units=Units(include=["*mlp.gate"]))
