"""Model cards: the hub's metadata is what huggingface_hub reads again, and the figures are the run's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from evosweep.core.results import read_result
from evosweep.exporters.card import origin
from evosweep.exporters.dense import DenseSafetensors
from evosweep.models.load import LoadedModel
from tests.cli import TINY, evosweep, workplace


@pytest.fixture
def written(loaded, evaluator, store, make_store_problem, tmp_path):
    def write(**changes) -> ModelCard:
        problem = make_store_problem(store)
        genome = np.arange(len(problem.units)) % 2
        DenseSafetensors(check_tokens=16).export(
            genome,
            problem=problem,
            evaluator=evaluator,
            loaded=replace(loaded, **changes),
            folder=tmp_path / "model",
        )
        return ModelCard.load(tmp_path / "model" / "README.md")

    return write


def test_the_metadata_names_base_model_and_licence(written) -> None:
    data = written(base="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0").data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.license == "apache-2.0"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation" and "evosweep" in data.tags


def test_a_licence_that_the_hub_does_not_know_is_named_as_another(written) -> None:
    card = written(license="My Terms of Use")
    assert card.data.license == "other" and card.data.license_name == "My Terms of Use"
    assert "- its licence: My Terms of Use" in card.text and card.data.base_model is None


def test_the_table_of_levels_is_that_of_the_allocation(written, store, make_store_problem) -> None:
    text = written().text
    problem = make_store_problem(store)
    genome = np.arange(len(problem.units)) % 2
    shares = [sum(u.numel for u in problem.units[start::2]) / int(problem.numels.sum()) for start in (0, 1)]
    assert f"| 2bit | 7 | {100 * shares[0]:.1f} % |\n| 3bit | 7 | {100 * shares[1]:.1f} % |" in text
    assert f"{problem.bits_per_weight(problem.cost(genome)):.3f} bits a weight" in text
    assert f"level store: `{store.key}`" in text and "not known here: see the base model" in text


def test_a_base_model_in_a_folder_says_its_licence_in_its_own_card(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: org/original\n---\n# A model\n")
    before = loaded.model.config._name_or_path
    loaded.model.config._name_or_path = str(tmp_path)
    try:
        assert origin(loaded) == ("org/original", "mit")
        (tmp_path / "README.md").unlink()
        assert origin(loaded) == ("", "")
    finally:
        loaded.model.config._name_or_path = before


def test_a_run_s_card_has_its_figures_and_its_command(tmp_path: Path) -> None:
    with workplace(tmp_path):
        settings = ["sampler=evopress", "export=dense", "tracking=none", "name=carded"]
        assert evosweep(*TINY, *settings) == 0
        run = next(tmp_path.glob("runs/carded/*/result.json")).parent
        row = read_result(run / "result.json")
        card = ModelCard.load(run / "model" / "README.md")
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results["perplexity"] == pytest.approx(row["ppl"], abs=1e-4)
        assert results["kl"] == pytest.approx(row["kl"], abs=1e-4)
        assert f"| dense | 32.000 | 0.0000 | {row['dense_ppl']:.2f} |" in card.text
        assert f"| uniform | {row['uniform']['bits_per_weight']:.3f} | {row['uniform']['kl']:.4f} |" in card.text
        assert f"| this model | {row['bits_per_weight']:.3f} | {row['kl']:.4f} | {row['ppl']:.2f} |" in card.text
        assert f"Budget: {row['budget']}." in card.text
        assert "python -m evosweep model=tiny" in card.text and "sampler=evopress" in card.text
        size = sum(path.stat().st_size for path in (run / "model").iterdir())
        assert row["export"]["bytes"] == size
        assert evosweep("export", str(run), "export=packed", "--to", "again") == 0
        again = ModelCard.load(tmp_path / "again" / "README.md")
        assert f"| this model | {row['bits_per_weight']:.3f} |" in again.text
