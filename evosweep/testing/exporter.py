"""Requirements of an exporter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evosweep.compressors.base import Compressor
from evosweep.compressors.gptq import GPTQ
from evosweep.core.problem import Genome, Problem
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import plan_store
from evosweep.testing.tiny import tiny_model, tiny_splits

Exported = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""What ``export`` returned, and the model's tensors before it."""


class ExporterContract:
    """Test suite of exporters, on a tiny model; subclass it and implement ``make``."""

    def make(self) -> Any:
        """Return the exporter."""
        raise NotImplementedError

    def compressor(self) -> Compressor:
        """Return the compressor that makes the levels; override it where an exporter needs certain levels."""
        return GPTQ(bits=[2, 3, 4], group=16)

    @pytest.fixture(scope="class")
    def loaded(self) -> LoadedModel:
        """Return the model."""
        return tiny_model()

    @pytest.fixture(scope="class")
    def splits(self, loaded: LoadedModel) -> dict[str, TokenSplit]:
        """Return token windows."""
        return tiny_splits(loaded)

    @pytest.fixture(scope="class")
    def store(
        self, loaded: LoadedModel, splits: dict[str, TokenSplit], tmp_path_factory: pytest.TempPathFactory
    ) -> LevelStore:
        """Return the levels that ``compressor`` makes, in a cache folder of their own."""
        plan = plan_store(Anatomy(loaded.model), self.compressor())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EVOSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
            return StoreBuilder().open(plan, splits["calibration"], model_name="tiny")

    @pytest.fixture(scope="class")
    def evaluator(self, loaded: LoadedModel, store: LevelStore, splits: dict[str, TokenSplit]) -> Evaluator:
        """Return what computes the model with any levels."""
        return Evaluator(anatomy=Anatomy(loaded.model), store=store, splits=splits)

    @pytest.fixture
    def problem(self, store: LevelStore) -> Problem:
        """Return the problem with the budget of the second level for all units."""
        bits = sum(unit.levels[1].cost for unit in store.units)
        return Problem(units=store.units, budget=bits, fixed_bits=store.fixed_bits)

    @pytest.fixture
    def genome(self, problem: Problem) -> Genome:
        """Return the levels that are exported: the first and the second in turn."""
        return np.arange(len(problem.units)) % 2

    @pytest.fixture
    def exported(
        self, genome: Genome, loaded: LoadedModel, evaluator: Evaluator, problem: Problem, tmp_path: Path
    ) -> Exported:
        """Return what an export to ``tmp_path / "model"`` returned, and the model's tensors before it."""
        before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        folder = tmp_path / "model"
        facts = self.make().export(genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=folder)
        return facts, before

    def test_it_reports_what_it_wrote(self, exported: Exported, tmp_path: Path) -> None:
        """Path and size in the report are those on disk, and nothing else is left behind."""
        facts, _ = exported
        written = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
        assert facts["path"] == str(tmp_path / "model") and facts["bytes"] == written > 0
        assert facts["size_mb"] == pytest.approx(written / 1e6, abs=1e-3)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.usefixtures("exported")
    def test_its_size_is_known_beforehand(
        self, genome: Genome, evaluator: Evaluator, problem: Problem, tmp_path: Path
    ) -> None:
        """A full disk must be found out before hours of writing."""
        winner = Winner(genome, problem, evaluator)
        written = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
        assert self.make().expected_bytes(winner) == pytest.approx(written, rel=0.15)

    def test_the_line_that_it_gives_loads_what_was_scored(
        self,
        exported: Exported,
        genome: Genome,
        evaluator: Evaluator,
        splits: dict[str, TokenSplit],
        tmp_path: Path,
    ) -> None:
        """The line in the report and the README gives a model with the logits that the search scored."""
        facts, _ = exported
        assert str(tmp_path / "model") in facts["how_to_load"] and "\n" not in facts["how_to_load"]
        assert facts["load"] in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
        scope: dict[str, Any] = {}
        exec(facts["how_to_load"], scope)
        tokens = torch.from_numpy(splits["search"].windows[:1])
        with torch.no_grad():
            logits = scope["model"].eval()(input_ids=tokens).logits[0]
        assert torch.allclose(logits, evaluator.logits(genome, tokens), atol=1e-4)

    def test_the_model_in_memory_is_left_as_it_was(self, exported: Exported, loaded: LoadedModel) -> None:
        """Other winners are exported from the same model."""
        _, before = exported
        assert all((before[name] == tensor).all() for name, tensor in loaded.model.state_dict().items())
