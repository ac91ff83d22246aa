"""What every exporter must do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_the_model_in_memory_is_left_as_it_was(self, exported, loaded) -> None:
        _, before = exported
        assert all((before[name] == tensor).all() for name, tensor in loaded.model.state_dict().items())
