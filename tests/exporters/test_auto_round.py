import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.auto_round import AutoRound
from evosweep.exporters.base import Winner
from evosweep.exporters.bit_stream import unpack_words
from evosweep.exporters.integer_layers import IntegerLayer
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.exporters.integer_contract import IntegerContract, assert_scored, logits_of, tensor_bytes
from tests.models.test_anatomy import small
from tests.models.test_dropping import NoTokenizer
from tests.models.test_dropping import splits as two_splits


class AutoRoundContract(IntegerContract):
    """The contract, and what transformers says of the same folder with auto-round."""

    widths = (2, 3, 4, 5, 6, 7, 8)

    def make(self) -> AutoRound:
        return AutoRound(check_tokens=16)

    def test_auto_round_gives_what_was_scored(self, exported, evaluator, genome, splits, store, tmp_path) -> None:
        tokens = splits["search"].windows[:2]
        logits, facts = logits_of("auto_round", tmp_path / "model", tokens)
        assert_scored(logits, tokens, evaluator, genome)
        assert facts["layers"] == {unit.name: self.widths[genome[index]] for index, unit in enumerate(store.units)}

    def test_codes_zeros_scales_and_size_are_those_of_the_store(
        self, exported, genome, store, problem, evaluator, tmp_path
    ) -> None:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        counted = 0
        for index, unit in enumerate(store.units):
            layer = IntegerLayer.of(store.payload(unit.name, unit.levels[genome[index]].name))
            found = {name: tensors[f"{unit.name}.{name}"] for name in ("qweight", "qzeros", "scales")}
            assert torch.equal(unpack_words(found["qweight"].T.contiguous(), layer.width), layer.codes)
            assert torch.equal(unpack_words(found["qzeros"], layer.width).T, layer.zeros)
            assert torch.equal(found["scales"].T, layer.scales)
            counted += unit.levels[genome[index]].cost
            counted += layer.zeros.numel() * layer.width if self.symmetric else 0
        assert 8 * tensor_bytes(tmp_path / "model") == counted + problem.fixed_bits
        assert self.make().expected_bytes(Winner(genome, problem, evaluator)) == tensor_bytes(tmp_path / "model")


class TestAsymmetric(AutoRoundContract):
    pass


class TestSymmetricAndTied(AutoRoundContract):
    symmetric = True
    group = 64


class TestWholeRows(AutoRoundContract):
    group = None
    widths = (3, 5)


def test_biases_layers_as_they_are_and_a_dropped_block(tmp_path) -> None:
    anatomy, texts = Anatomy(small("qwen2", hidden_size=64, intermediate_size=96)), two_splits()
    compressor = Several(parts={"gptq": GPTQ(bits=[3, 6], group=32), "as_is": AsIs()}, dominated=True)
    plan = plan_store(anatomy, compressor, Drop(granularity="blocks", keep=[0, 2]))
    store = StoreBuilder().open(plan, texts["calibration"], model_name="qwen2")
    problem = Budget(bits_per_weight=20).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(problem.units)) % 3
    genome[next(iter(store.drops))] = 0
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    exporter, loaded = AutoRound(check_tokens=16), LoadedModel("qwen2", anatomy.model, NoTokenizer())
    exporter.check(compressor, plan.drop, anatomy, Units())
    exporter.check_problem(problem, anatomy)
    exporter.export(genome, problem=problem, evaluator=evaluator, folder=tmp_path / "model", loaded=loaded)
    tokens = texts["search"].windows[:2]
    logits, facts = logits_of("auto_round", tmp_path / "model", tokens)
    assert_scored(logits, tokens, evaluator, genome)
    blocks = {path.split(".")[2] for path in facts["layers"]}
    assert blocks == {"0", "1"} and set(facts["layers"].values()) == {3, 6} and len(facts["layers"]) < 14


@pytest.mark.parametrize(
    ("compressor", "drop", "units", "dtype", "message"),
    [
        (GPTQ(group=8), Drop(), Units(), "float32", r"groups of 16, .* the nearest that fits is 16"),
        (SparseGPT(), Drop(), Units(), "float32", "it holds bit-widths in groups"),
        (GPTQ(group=32), Drop(), Units(), "bfloat16", r"compressor\.coarse_scales=true"),
        (GPTQ(group=32), Drop(granularity="sublayers"), Units(), "float16", "drop=blocks"),
        (GPTQ(group=32), Drop(), Units(embedding=RoundToNearest(group=32)), "float32", "units=none"),
    ],
)
def test_what_has_no_place_in_the_format_is_told_before_any_work(
    compressor, drop, units, dtype: str, message: str
) -> None:
    anatomy = Anatomy(small("llama", intermediate_size=64).to(getattr(torch, dtype)))
    with pytest.raises(SettingError, match=message):
        AutoRound().check(compressor, drop, anatomy, units)


def test_layers_that_do_not_fill_words_are_told_before_the_search() -> None:
    anatomy = Anatomy(small("llama", intermediate_size=64))
    units = plan_store(anatomy, RoundToNearest(bits=[4, 8], group=32)).units
    message = (
        r"the layer has 16 outputs, and this one needs a multiple of 32.*4bit of model\.layers\.0\.self_attn\.k_proj"
    )
    with pytest.raises(SettingError, match=message):
        AutoRound().check_problem(Budget(as_uniform=4).problem(units), anatomy)
