from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.uncompressed import NoCompression
from evosweep.core.allocation import Allocation
from evosweep.core.budget import Budget
from evosweep.core.errors import ExportError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Exporter
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing import ExporterContract
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import NoTokenizer
from tests.models.test_dropping import splits as two_splits


class TestDenseSafetensors(ExporterContract):
    def make(self) -> DenseSafetensors:
        return DenseSafetensors(check_tokens=16)

    def test_its_weights_are_the_levels(self, exported, store, tmp_path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        weights = dict(model.named_parameters())
        for place, unit in enumerate(store.units):
            assert torch.equal(weights[f"{unit.name}.weight"], store.weight(unit.name, unit.levels[place % 2].name))

    def test_it_says_what_was_scored(self, exported, evaluator, splits, tmp_path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        tokens = torch.from_numpy(splits["search"].windows[:1])
        genome = np.arange(len(evaluator.store.units)) % 2
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        assert torch.allclose(logits, evaluator.logits(genome, tokens), atol=1e-5)

    def test_the_allocation_lies_beside_it(self, exported, store, tmp_path) -> None:
        allocation = Allocation.load(tmp_path / "model" / "allocation.json")
        assert set(allocation) == {unit.name for unit in store.units}


class Shrunk:
    """A model of three blocks, of which what the parameters of a test name is dropped."""

    def __init__(self, family: str, granularity: str) -> None:
        self.anatomy = Anatomy(small(family, **FAMILIES[family]))
        self.texts = two_splits()
        plan = plan_store(self.anatomy, NoCompression(), Drop(granularity=granularity))
        store = StoreBuilder().open(plan, self.texts["calibration"], model_name=family)
        self.evaluator = Evaluator(anatomy=self.anatomy, store=store, splits=self.texts)
        self.problem = Budget(blocks_kept=0.9).problem(store.units, fixed_bits=store.fixed_bits)

    def export(self, dropped: list[int], folder: Path, exporter: Exporter) -> tuple[np.ndarray, int]:
        """Export without some units; return the allocation and the bytes of all tensors."""
        genome = self.problem.sizes - 1
        genome[dropped] = 0
        exporter.export(
            genome,
            problem=self.problem,
            evaluator=self.evaluator,
            loaded=LoadedModel("shrunk", self.anatomy.model, NoTokenizer()),
            folder=folder,
        )
        return genome, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_block_without_attention_and_mlp_is_left_out(family: str, tmp_path: Path) -> None:
    shrunk = Shrunk(family, "sublayers")
    _, whole = shrunk.export([], tmp_path / "whole", DenseSafetensors())
    genome, size = shrunk.export([2, 3], tmp_path / "model", DenseSafetensors())
    block = sum(parameter.numel() * 4 for parameter in shrunk.anatomy.blocks[1].parameters())
    assert size == pytest.approx(whole - block, abs=3000)  # names and shapes of tensors
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.config.num_hidden_layers == 2 and len(getattr(model.config, "layer_types", None) or [1, 2]) == 2
    tokens = torch.from_numpy(shrunk.texts["search"].windows[:1])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0]
    assert torch.allclose(logits, shrunk.evaluator.logits(genome, tokens), atol=1e-5)
    assert "1 blocks were dropped and are left out" in (tmp_path / "model" / "README.md").read_text()
    assert len(shrunk.anatomy.blocks) == shrunk.anatomy.model.config.num_hidden_layers == 3


def test_an_attention_dropped_alone_is_zeros_and_that_is_said(tmp_path: Path) -> None:
    shrunk = Shrunk("llama", "sublayers")
    _, whole = shrunk.export([], tmp_path / "whole", DenseSafetensors())
    _, size = shrunk.export([0, 3], tmp_path / "model", DenseSafetensors())
    assert size == whole
    assert "2 attention or MLP sub-blocks were dropped alone" in (tmp_path / "model" / "README.md").read_text()
    assert "no bytes and no time are saved" not in (tmp_path / "whole" / "README.md").read_text()
    _, packed = shrunk.export([0, 3], tmp_path / "packed", PackedSafetensors())
    assert packed < whole  # its own loader puts the zeros back


def test_lists_in_the_config_that_are_not_by_block_stay_as_they_are(tmp_path: Path) -> None:
    shrunk = Shrunk("llama", "blocks")
    shrunk.anatomy.model.config.eos_token_id = [5, 6, 7]  # as many as there are blocks
    shrunk.export([1], tmp_path / "model", DenseSafetensors())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.eos_token_id == [5, 6, 7] and config.num_hidden_layers == 2


def test_transformers_reads_no_sub_blocks_to_skip() -> None:
    """What the page about dropping claims; where this fails, a lone sub-block can be left out at last."""
    model = small("llama", **FAMILIES["llama"])
    skipping = type(model)(type(model.config)(**model.config.to_dict(), per_layer_config={1: {"skip": ["mlp"]}}))
    assert skipping.config.per_layer_config[1].skip == ["mlp"]
    assert set(skipping.state_dict()) == set(model.state_dict())


def test_a_model_that_reloads_as_another_is_an_error(
    loaded, evaluator, store, make_store_problem, tmp_path, monkeypatch
) -> None:
    problem = make_store_problem(store)
    monkeypatch.setattr(type(evaluator), "logits", lambda *_: torch.full((16, 256), 3.0))
    with pytest.raises(ExportError, match=r"does not give the logits that were scored: .*it is in .*model\.differs"):
        DenseSafetensors(check_tokens=16).export(
            problem.uniform(), problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.differs"]
    assert (tmp_path / "model.differs" / "model.safetensors").is_file()
