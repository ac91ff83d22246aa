"""Dropping: parts of any decoder, scored and exported as if they were not there."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import transformers

from evosweep.allocators.ranking import BlockInfluence
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.uncompressed import NoCompression
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop, droppables
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.models.test_anatomy import FAMILIES, small


class NoTokenizer:
    def save_pretrained(self, folder: object) -> None:
        del folder


def splits() -> dict[str, TokenSplit]:
    rng = np.random.default_rng(0)
    names = ("calibration", "search", "validation")
    return {name: TokenSplit(name, rng.integers(0, 64, (4, 16)), ("x",)) for name in names}


@pytest.fixture(scope="module", params=FAMILIES)
def anatomy(request) -> Anatomy:
    return Anatomy(small(request.param, **FAMILIES[request.param]))


def plainly(anatomy: Anatomy, store, genome, windows) -> float:
    """Return the perplexity with hooks that take away what is dropped."""
    effects = [effect for index, effect in store.drops.items() if genome[index] == 0]
    tokens = torch.from_numpy(windows)
    with ExitStack() as stack, torch.no_grad():
        for effect in effects:
            if effect.whole:
                for block in effect.blocks:
                    stack.callback(anatomy.blocks[block].register_forward_hook(_pass_by, with_kwargs=True).remove)
            else:
                module = anatomy.model.get_submodule(effect.writer)
                stack.callback(module.register_forward_hook(_zero).remove)
        logits = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float(loss.exp())


def _zero(module, args, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _pass_by(module, args, kwargs, output):
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@pytest.mark.parametrize("granularity", ["sublayers", "blocks", "pairs"])
def test_dropped_parts_are_as_if_not_there(anatomy: Anatomy, granularity: str, tmp_path) -> None:
    texts = splits()
    store = StoreBuilder().open(
        plan_store(anatomy, NoCompression(), Drop(granularity=granularity)), texts["calibration"], model_name="family"
    )
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    assert store.units == tuple(  # planned as built, but for what calibration measures
        type(unit)(**{**vars(unit), "columns": built.columns})
        for unit, built in zip(
            plan_store(anatomy, NoCompression(), Drop(granularity=granularity)).units, store.units, strict=True
        )
    )
    genomes = np.ones((4, len(store.units)), dtype=np.int64)
    genomes[1, 0], genomes[2, -1], genomes[3] = 0, 0, 0
    genomes[3, 1] = 1
    scores = evaluator.score(genomes, split="search", windows=[0, 3], fitness=[Perplexity()])["ppl"]
    for genome, score in zip(genomes, scores, strict=True):
        assert score == pytest.approx(plainly(anatomy, store, genome, texts["search"].windows[[0, 3]]), rel=1e-5)
    assert len(set(scores.round(9))) == len({tuple(genome) for genome in genomes})
    problem = Budget(blocks_kept=0.7).problem(store.units, fixed_bits=store.fixed_bits)
    facts = DenseSafetensors().export(
        genomes[1],
        problem=problem,
        evaluator=evaluator,
        folder=tmp_path / "model",
        loaded=LoadedModel("family", anatomy.model, NoTokenizer()),
    )
    assert facts["max_logit_difference"] < 1e-5
    blocks = {"sublayers": 3, "blocks": 2, "pairs": 1}[granularity]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").num_hidden_layers == blocks
    assert anatomy.model.config.num_hidden_layers == 3


def test_costs_are_all_parameters_once(anatomy: Anatomy) -> None:
    whole = sum(parameter.numel() for parameter in anatomy.model.parameters()) * 32
    for granularity in (None, "sublayers", "blocks", "pairs"):
        plan = plan_store(anatomy, GPTQ(bits=[2, 4], group=16), Drop(granularity=granularity))
        units, fixed = plan.units, plan.fixed_bits
        most = Budget(bits_per_weight=40).problem(units)
        packed = sum(unit.levels[-1].cost for unit in units if len(unit.levels) == 2 and unit.levels[0].name == "2bit")
        weights = sum(slot.read().numel() for slot in anatomy.slots) * 32
        assert most.most - packed + weights + fixed == whole


def test_sublayers_are_attention_and_mlp_even_without_a_module_of_their_own() -> None:
    names = [
        option.name.split(".1.")[1]
        for option in droppables(Anatomy(small("opt", **FAMILIES["opt"])), "sublayers")
        if option.blocks == (1,)
    ]
    assert names == ["self_attn", "fc1+fc2"]


def test_influence_of_a_block_is_one_minus_the_cosine_of_its_ends(anatomy: Anatomy) -> None:
    texts = splits()
    store = StoreBuilder().open(
        plan_store(anatomy, NoCompression(), Drop(granularity="blocks")), texts["calibration"], model_name="family"
    )
    with torch.no_grad():
        states = anatomy.embed(torch.from_numpy(texts["calibration"].windows))
        for unit, block in zip(store.units, range(3), strict=True):
            after = anatomy.run_block(block, states)
            expected = 1 - torch.nn.functional.cosine_similarity(states, after, dim=-1).mean()
            assert unit.columns["influence"] == pytest.approx(float(expected), abs=1e-5)
            states = after
    problem = Budget(blocks_kept=0.67).problem(store.units)
    least = int(np.argmin([unit.columns["influence"] for unit in store.units]))
    assert np.flatnonzero(BlockInfluence().allocate(problem) == 0).tolist() == [least]


def test_what_must_stay_is_no_unit(anatomy: Anatomy) -> None:
    units = plan_store(anatomy, NoCompression(), Drop(granularity="sublayers", keep=[0, -1])).units
    assert {unit.block for unit in units} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "sublayer"}, "granularity.*sublayers.*'sublayer'.*did you mean"),
        ({"granularity": "blocks", "keep": [3]}, r"keep\[0\].*-3.*2.*3"),
        ({"granularity": "blocks", "keep": "first"}, "keep.*list.*'first'"),
    ],
)
def test_bad_settings_are_said(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Drop(**settings).options(Anatomy(small("llama")))
