"""What every exporter must do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evosweep.exporters.base import Winner


class ExporterContract:
    """Subclass with ``make``."""

    def make(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def exported(self, loaded, evaluator, store, make_store_problem, tmp_path: Path):
        problem = make_store_problem(store)
        genome = np.arange(len(problem.units)) % 2
        before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        facts = self.make().export(
            genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=tmp_path / "model"
        )
        return facts, before

    def test_it_says_what_it_wrote(self, exported, tmp_path: Path) -> None:
        facts, _ = exported
        written = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
        assert facts["path"] == str(tmp_path / "model") and facts["bytes"] == written > 0
        assert facts["size_mb"] == pytest.approx(written / 1e6, abs=1e-3)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_its_size_is_known_beforehand(self, exported, evaluator, make_store_problem, store, tmp_path: Path) -> None:
        problem = make_store_problem(store)
        winner = Winner(np.arange(len(problem.units)) % 2, problem, evaluator)
        written = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
        assert self.make().expected_bytes(winner) == pytest.approx(written, rel=0.15)

    def test_the_line_that_it_gives_loads_what_was_scored(self, exported, evaluator, splits, tmp_path: Path) -> None:
        facts, _ = exported
        assert str(tmp_path / "model") in facts["how_to_load"] and "\n" not in facts["how_to_load"]
        assert facts["load"] in (tmp_path / "model" / "README.md").read_text()
        scope: dict[str, Any] = {}
        exec(facts["how_to_load"], scope)
        tokens = torch.from_numpy(splits["search"].windows[:1])
        genome = np.arange(len(evaluator.store.units)) % 2
        with torch.no_grad():
            logits = scope["model"].eval()(input_ids=tokens).logits[0]
        assert torch.allclose(logits, evaluator.logits(genome, tokens), atol=1e-4)

    def test_the_model_in_memory_is_left_as_it_was(self, exported, loaded) -> None:
        _, before = exported
        assert all((before[name] == tensor).all() for name, tensor in loaded.model.state_dict().items())
