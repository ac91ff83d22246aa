import numpy as np
import pytest
import torch
import transformers

from evosweep.core.allocation import Allocation
from evosweep.core.errors import ExportError
from evosweep.exporters.dense import DenseSafetensors
from evosweep.testing import ExporterContract


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
