"""Tied layers from the command line to the export, and through the evaluator."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evosweep.core.errors import SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.core.results import read_result
from evosweep.core.ties import Expansion
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure
from evosweep.exporters.base import Winner
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.fusion import fused_layers
from evosweep.store.units import Units
from tests.cli import TINY, evosweep, workplace
from tests.models.test_anatomy import FAMILIES, small

SAMPLERS = ("uniform", "evopress", "ilp", "dp")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    with workplace(tmp_path_factory.mktemp("ties")) as folder:
        settings = [
            "units.tie=fused",
            f"sampler={','.join(SAMPLERS)}",
            "export.jobs=all",
            "name=ties",
            "report=none",
            "tracking=none",
        ]
        assert evosweep("-m", *TINY, *settings) == 0
        found = [(path.parent, read_result(path)) for path in folder.glob("runs/ties/*/*/result.json")]
        yield {row["sampler"]: {**row, "folder": run} for run, row in found}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_kind_of_search_keeps_ties(rows, sampler: str) -> None:
    row = rows[sampler]
    written = json.loads((Path(row["folder"]) / "allocation.json").read_text())
    assert len(written["ties"]) == 4 and len(written["ties"][0]) == 3
    for names in written["ties"]:
        assert len({written["allocation"][name] for name in names}) == 1
    assert row["export"]["max_logit_difference"] < 1e-4
    exported = json.loads((Path(row["folder"]) / "model" / "allocation.json").read_text())
    assert exported["allocation"] == written["allocation"]


@pytest.fixture(scope="module")
def tied_units(anatomy, store):
    return Units(tie="fused").tied(store.units, anatomy)


@pytest.fixture(scope="module")
def tied_evaluator(anatomy, store, splits, tied_units) -> Evaluator:
    return Evaluator(anatomy=anatomy, store=store, splits=splits, units=tied_units)


@pytest.fixture(scope="module")
def tied_problem(tied_units, store) -> Problem:
    return Problem(units=tied_units, budget=sum(unit.levels[1].cost for unit in store.units))


def test_a_tied_allocation_scores_as_its_layers_do(evaluator, tied_evaluator, tied_units, store, splits) -> None:
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 3, (5, len(tied_units)))
    layers = Expansion.of(tied_units, store.units)(genomes)
    assert layers.shape == (5, 14) and genomes.shape == (5, 8)
    wanted = {"split": "search", "windows": [0, 1], "fitness": [KL()]}
    scored = tied_evaluator.score(genomes, **wanted)["kl"]
    assert (scored == evaluator.score(layers, **wanted)["kl"]).all() and len(set(scored)) == 5
    tokens = torch.from_numpy(splits["search"].windows[:1])
    assert torch.equal(tied_evaluator.logits(genomes[0], tokens), evaluator.logits(layers[0], tokens))


def test_the_error_of_a_tied_level_is_that_of_the_stacked_weight(tied_units, store, anatomy) -> None:
    apart = {unit.name: unit for unit in store.units}
    for unit in tied_units:
        for level, name in enumerate(unit.level_names):
            members = [apart[layer.name].levels[level] for layer in unit.layers]
            assert {member.name for member in members} == {name}
            assert unit.levels[level].error == pytest.approx(sum(member.error for member in members))
            norms = [member.error / member.relative_error for member in members]
            assert unit.levels[level].relative_error == pytest.approx(unit.levels[level].error / sum(norms))


@pytest.mark.parametrize("column", ["hill", "hawq", "kl_per_error"])
def test_measurements_are_those_of_the_tied_unit(
    column: str, tied_evaluator, tied_problem, evaluator, store, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    from evosweep.allocators.alpha_pruning import HILL
    from evosweep.allocators.harm import HAWQ, KL_PER_ERROR

    name = {"hill": HILL, "hawq": HAWQ, "kl_per_error": KL_PER_ERROR}[column]
    how = {"tokens": 64, "seed": 0, "progress": Silent()}
    tied, _ = measure(name, tied_evaluator, tied_problem, **how)
    assert set(tied) == {unit.name for unit in tied_problem.units}
    alone, _ = measure(name, evaluator, Problem(units=store.units, budget=tied_problem.budget), **how)
    first = tied_problem.units[0]
    own = [alone[layer.name] for layer in first.layers]
    if column == "hill":
        mean = np.average([value[HILL] for value in own], weights=[layer.numel for layer in first.layers])
        assert tied[first.name][HILL] == pytest.approx(mean)
    if column == "hawq":
        assert set(tied[first.name]) == {*(f"{HAWQ}/{level}" for level in first.level_names), f"{HAWQ}_order"}
    assert all(np.isfinite(list(values.values())).all() for values in tied.values())


def test_a_winner_is_taken_apart_into_layers(tied_evaluator, tied_problem, store, splits, loaded, tmp_path) -> None:
    genome = np.arange(len(tied_problem.units)) % 2
    winner = Winner(genome, tied_problem, tied_evaluator)
    assert winner.problem.units == store.units and winner.problem.cost(winner.genome) == tied_problem.cost(genome)
    facts = PackedSafetensors().export(
        genome, problem=tied_problem, evaluator=tied_evaluator, loaded=loaded, folder=tmp_path / "model"
    )
    assert facts["max_logit_difference"] < 1e-4


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"]),
        ("phi3", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        ("gpt_neox", None),
    ],
)
def test_fused_layers_of_other_decoders(family: str, kinds: list[str] | None) -> None:
    from evosweep.compressors.rtn import RoundToNearest
    from evosweep.store.store_plan import plan_store

    anatomy = Anatomy(small(family, **FAMILIES[family]))
    units = plan_store(anatomy, RoundToNearest(bits=[2, 4], group=16)).units
    found = list(dict.fromkeys(unit.kind for unit in Units(tie="fused").tied(units, anatomy)))
    assert sorted(found) == sorted(kinds or {unit.kind for unit in units})
    assert (fused_layers(anatomy) == []) == (family in ("phi3", "gpt_neox"))


def test_a_setting_that_ties_nothing_names_itself(anatomy, store) -> None:
    with pytest.raises(SettingError, match=r"tie must be one of none, fused, got 'fusd' \(did you mean 'fused'"):
        Units(tie="fusd")
    with pytest.raises(SettingError, match="tie must be none, fused, or a list of patterns, got 3"):
        Units(tie=3)
    with pytest.raises(SettingError, match=r"did you mean .self_attn\.q_proj."):
        Units(tie=["self_attn.q_prj"]).tied(store.units, anatomy)
    both = Units(tie=["fused", r".*(o|down)_proj"]).tied(store.units, anatomy)
    assert [unit.kind for unit in both] == [
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj+mlp.down_proj",
        "mlp.gate_proj+up_proj",
    ] * 2
