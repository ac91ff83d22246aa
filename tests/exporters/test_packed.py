import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.compressors.uncompressed import NoCompression
from evosweep.compressors.wanda import Wanda
from evosweep.core.errors import ExportError
from evosweep.core.problem import Problem
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.exporters.packed import CONFIG, INDEX, TENSORS, PackedSafetensors, load, write_index
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing import ExporterContract
from tests.models.test_anatomy import small
from tests.models.test_dropping import NoTokenizer, splits


class TestPackedSafetensors(ExporterContract):
    def make(self) -> PackedSafetensors:
        return PackedSafetensors(check_tokens=16)

    def test_its_weights_are_the_levels(self, exported, store, tmp_path) -> None:
        weights = dict(load(tmp_path / "model").named_parameters())
        for place, unit in enumerate(store.units):
            assert torch.equal(weights[f"{unit.name}.weight"], store.weight(unit.name, unit.levels[place % 2].name))

    def test_it_says_what_was_scored(self, exported, evaluator, splits, tmp_path) -> None:
        tokens = torch.from_numpy(splits["search"].windows[:1])
        genome = np.arange(len(evaluator.store.units)) % 2
        with torch.no_grad():
            logits = load(tmp_path / "model")(input_ids=tokens).logits[0]
        assert torch.allclose(logits, evaluator.logits(genome, tokens), atol=1e-5)

    def test_its_file_is_as_large_as_the_budget_counts(self, exported, store, make_store_problem, tmp_path) -> None:
        problem = make_store_problem(store)
        counted = 1e6 * problem.megabytes(problem.cost(np.arange(len(problem.units)) % 2))
        file = tmp_path / "model" / TENSORS
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == pytest.approx(counted, abs=1)

    @pytest.mark.parametrize("name", [TENSORS, INDEX, CONFIG])
    def test_a_flipped_bit_anywhere_is_refused_by_name(self, exported, tmp_path, name: str) -> None:
        folder = tmp_path / "model"
        file = folder / name
        written = file.read_bytes()
        for position in range(0, len(written), max(1, len(written) // 12)):
            changed = bytearray(written)
            changed[position] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ExportError, match=name):
                load(folder)
        file.write_bytes(written)
        load(folder)

    def test_a_folder_that_is_no_packed_model_is_refused(self, exported, tmp_path) -> None:
        folder = tmp_path / "model"
        with pytest.raises(ExportError, match="is no packed model"):
            load(tmp_path)
        index = json.loads((folder / INDEX).read_text())
        for key in ("digest", "files"):
            del index[key]
        whole = load_file(folder / TENSORS)
        save_file({name: tensor for name, tensor in whole.items() if "norm" not in name}, folder / TENSORS)
        write_index(folder, index)
        with pytest.raises(ExportError, match=r"lacks model\.layers\.0\.input_layernorm\.weight and 4 more"):
            load(folder)
        save_file({name: tensor for name, tensor in whole.items() if "scales" not in name}, folder / TENSORS)
        write_index(folder, index)
        with pytest.raises(ExportError, match=r"missing or damaged"):
            load(folder)
        write_index(folder, {**index, "version": 99})
        with pytest.raises(ExportError, match="version 99"):
            load(folder)
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:100])
        write_index(folder, index)
        with pytest.raises(ExportError, match="missing or damaged"):
            load(folder)


COMPRESSORS = {
    "none": NoCompression(),
    "rtn": RoundToNearest(bits=[2, 4], group=16),
    "rows": RoundToNearest(bits=[3, 8], group=None, symmetric=True, coarse_scales=True),
    "wanda": Wanda(),
    "2:4": Wanda(patterns=["2:4"]),
    "sparse_gptq": SparseGPTQ(sparsity=[0.5], bits=[2, 4], group=16, mask_block=16, column_block=16),
}
CHOICES = [
    (name, granularity)
    for name in COMPRESSORS
    for granularity in (None, "sublayers", "blocks", "pairs")
    if (name, granularity) != ("none", None)  # nothing to choose
]


@pytest.mark.parametrize(("name", "granularity"), CHOICES)
def test_it_holds_whatever_a_search_may_choose(name: str, granularity: str | None, tmp_path) -> None:
    compressor = COMPRESSORS[name]
    model = small("qwen2")
    anatomy, texts = Anatomy(model), splits()
    drop = Drop(granularity=granularity)
    store = StoreBuilder().open(plan_store(anatomy, compressor, drop), texts["calibration"], model_name="qwen2")
    problem = Problem(
        units=store.units, budget=sum(unit.levels[-1].cost for unit in store.units), fixed_bits=store.fixed_bits
    )
    genome = np.arange(len(store.units)) % [len(unit.levels) for unit in store.units]
    for index in list(store.drops)[1:]:
        genome[index] = 1
    for index in list(store.drops)[:1]:
        genome[index] = 0
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    facts = PackedSafetensors().export(
        genome,
        problem=problem,
        evaluator=evaluator,
        folder=tmp_path / "model",
        loaded=LoadedModel("qwen2", model, NoTokenizer()),
    )
    assert facts["max_logit_difference"] < 1e-5
    file = tmp_path / "model" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    expected = PackedSafetensors().expected_bytes(Winner(genome, problem, evaluator))
    assert file.stat().st_size - header == pytest.approx(expected, abs=1)


def test_a_full_disk_is_said_before_anything_is_written(
    loaded, evaluator, store, make_store_problem, tmp_path, monkeypatch
) -> None:
    problem = make_store_problem(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"the export takes about 0\.\d+ MB in .*model, where 0\.001 MB are free"):
        PackedSafetensors().export(
            problem.uniform(), problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
        )
    assert list(tmp_path.iterdir()) == []
