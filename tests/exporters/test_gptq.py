import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.several import Several
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.exporters.bit_stream import unpack_words
from evosweep.exporters.gptq_v2 import GPTQv2
from evosweep.exporters.integer_layers import IntegerLayer
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.exporters.integer_contract import IntegerContract, assert_scored, logits_of, tensor_bytes
from tests.models.test_anatomy import small
from tests.models.test_dropping import NoTokenizer
from tests.models.test_dropping import splits as two_splits


class GPTQContract(IntegerContract):
    """The contract, and what GPTQModel says of the same folder."""

    def make(self) -> GPTQv2:
        return GPTQv2(check_tokens=16)

    def test_gptqmodel_gives_what_was_scored(self, exported, evaluator, genome, splits, store, tmp_path) -> None:
        tokens = splits["search"].windows[:2]
        logits, facts = logits_of("gptqmodel", tmp_path / "model", tokens)
        assert_scored(logits, tokens, evaluator, genome)
        assert facts["layers"] == {unit.name: self.widths[genome[index]] for index, unit in enumerate(store.units)}

    def test_zeros_are_raw_and_groups_are_by_position(
        self, exported, genome, store, problem, evaluator, tmp_path
    ) -> None:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        counted, zeros = 0, []
        for index, unit in enumerate(store.units):
            layer = IntegerLayer.of(store.payload(unit.name, unit.levels[genome[index]].name))
            columns = layer.codes.shape[1]
            found = {name: tensors[f"{unit.name}.{name}"] for name in ("qweight", "qzeros", "g_idx")}
            assert torch.equal(unpack_words(found["qweight"].T.contiguous(), layer.width), layer.codes)
            assert torch.equal(unpack_words(found["qzeros"], layer.width).T, layer.zeros)
            assert found["g_idx"].tolist() == [column // layer.group for column in range(columns)]
            zeros.append(layer.zeros)
            counted += unit.levels[genome[index]].cost + 32 * columns
            counted += layer.zeros.numel() * layer.width if self.symmetric else 0
        assert 8 * tensor_bytes(tmp_path / "model") == counted + problem.fixed_bits
        assert self.make().expected_bytes(Winner(genome, problem, evaluator)) == tensor_bytes(tmp_path / "model")
        assert self.symmetric or any((found == 0).any() for found in zeros)  # what the first version cannot hold


class TestAsymmetric(GPTQContract):
    pass


class TestSymmetricAndTied(GPTQContract):
    symmetric = True
    group = 64


def test_biases_layers_as_they_are_and_a_dropped_block(tmp_path) -> None:
    anatomy, texts = Anatomy(small("qwen2", hidden_size=64, intermediate_size=96).half().float()), two_splits()
    compressor = Several(parts={"gptq": GPTQ(bits=[3, 8], group=32), "as_is": AsIs()}, dominated=True)
    plan = plan_store(anatomy, compressor, Drop(granularity="blocks", keep=[0, 2]))
    store = StoreBuilder().open(plan, texts["calibration"], model_name="qwen2")
    problem = Budget(bits_per_weight=20).problem(store.units, fixed_bits=store.fixed_bits)
    genome = np.arange(len(problem.units)) % 3
    genome[next(iter(store.drops))] = 0
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    exporter, loaded = GPTQv2(check_tokens=16), LoadedModel("qwen2", anatomy.model, NoTokenizer())
    exporter.check(compressor, plan.drop, anatomy)
    exporter.check_problem(problem, anatomy)
    exporter.export(genome, problem=problem, evaluator=evaluator, folder=tmp_path / "model", loaded=loaded)
    tokens = texts["search"].windows[:2]
    logits, facts = logits_of("gptqmodel", tmp_path / "model", tokens)
    assert_scored(logits, tokens, evaluator, genome)
    assert set(facts["layers"].values()) == {3, 8} and len(facts["layers"]) < 14


@pytest.mark.parametrize("width", [5, 6, 7])
def test_widths_without_a_kernel_are_told_before_the_search(width: int) -> None:
    anatomy = Anatomy(small("llama", hidden_size=64, intermediate_size=64))
    units = plan_store(anatomy, RoundToNearest(bits=[4, width], group=32)).units
    message = rf"this one holds 2, 3, 4, 8 bits; the nearest that fits is 4bit, got '{width}bit of model\.layers\.0"
    with pytest.raises(SettingError, match=message):
        GPTQv2().check_problem(Budget(as_uniform=4).problem(units), anatomy)
