"""EMQ from the proxies to the sampler, on a real model; proxies against plain float64 versions."""

import copy
import json

import numpy as np
import pytest
import torch

from evosweep.allocators.formulas import Bench
from evosweep.allocators.harm import EMQ
from evosweep.allocators.ilp import ILP
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.events import Silent
from evosweep.evaluate.emq import ALLOCATIONS, ranking
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.mq_bench import bench_genomes, read_bench, write_bench
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.proxies import activation_numbers, gradient_numbers, synflow_numbers
from evosweep.evaluate.sensitivity import measure
from evosweep.fitness.kl import KL
from tests.store.test_store import Heard


@pytest.fixture(scope="module")
def ids(splits: dict) -> torch.Tensor:
    return torch.from_numpy(splits["search"].windows[:1])


@pytest.fixture(scope="module")
def double(anatomy) -> torch.nn.Module:
    return copy.deepcopy(anatomy.model).double().requires_grad_(True)


def test_gradient_proxies_are_those_of_float64(evaluator: Evaluator, double, ids) -> None:
    slots = evaluator.anatomy.slots
    found = gradient_numbers(evaluator, slots, ids)
    logits = double(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    weights = [double.get_parameter(f"{slot.name}.weight") for slot in slots]
    for index, gradient in enumerate(torch.autograd.grad(loss, weights)):
        weight = weights[index].detach()
        changes = [evaluator.weight(index, level).double() - weight for level in range(3)]
        expected = [
            float((gradient * weight).abs().sum()),
            float(gradient.square().sum()),
            *(float((gradient * change).abs().sum()) for change in changes),
            *(float((gradient * change).sum() ** 2) for change in changes),
        ]
        assert found[index].tolist() == pytest.approx(expected, rel=2e-3)


def test_synflow_is_that_of_float64(evaluator: Evaluator, ids) -> None:
    slots = evaluator.anatomy.slots
    before = [slot.read().clone() for slot in slots]
    found = synflow_numbers(evaluator, slots, ids)
    model = copy.deepcopy(evaluator.anatomy.model).double()
    weights = [model.get_parameter(f"{slot.name}.weight") for slot in slots]
    for weight in weights:
        weight.requires_grad_(True).data.abs_()
    logits = model(input_ids=ids, use_cache=False).logits
    gradients = torch.autograd.grad(logits.mean(), weights)
    expected = [float((gradient * weight).sum().detach()) for gradient, weight in zip(gradients, weights, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert all(torch.equal(slot.read(), weight) for slot, weight in zip(slots, before, strict=True))


def test_activation_entropy_is_that_of_a_histogram(evaluator: Evaluator, double, ids) -> None:
    slot = evaluator.anatomy.slots[3]
    found = activation_numbers(evaluator.anatomy, [slot], ids)[0]
    kept = []
    hook = double.get_submodule(slot.name).register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    double(input_ids=ids, use_cache=False)
    hook.remove()
    values = kept[0].flatten().numpy()
    counts, _ = np.histogram(values, bins=256)
    shares = counts[counts > 0] / counts.sum()
    assert float(found[0]) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-2)
    assert float(found[1]) == pytest.approx(np.square(values).mean(), rel=1e-4)


@pytest.fixture(scope="module")
def problem(store, make_store_problem):
    return make_store_problem(store)


def test_bench_genomes_spend_the_budget_and_differ(problem) -> None:
    genomes = bench_genomes(problem, 60, seed=0)
    assert len(np.unique(genomes, axis=0)) == len(genomes) == 60
    assert all(problem.feasible(genome) for genome in genomes)
    moved = (genomes != problem.uniform()).sum(axis=1)
    assert moved[0] == 0 and (moved[1:] > 0).all() and len(np.unique(moved)) >= 4


def test_it_measures_evolves_and_allocates(evaluator: Evaluator, problem, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    heard = Heard()
    columns, tokens = measure(EMQ, evaluator, problem, tokens=32, seed=0, progress=heard)
    assert tokens == 32 * (ALLOCATIONS + len(problem.units))
    said = next(line for line in heard.lines if line.startswith("emq: "))
    held_out = float(said.split("Spearman")[1].split(", ")[1].split()[0])
    assert held_out > 0.5
    ranks = next(line for line in heard.lines if line.startswith("Spearman's correlation of each proxy"))
    for name in ("snip", "synflow", "fisher_trace", "activation_entropy", "outlier_ratio", "error"):
        assert name in ranks
    units = [type(unit)(**{**vars(unit), "columns": columns[unit.name]}) for unit in problem.units]
    measured = type(problem)(units=tuple(units), budget=problem.budget)
    genome = ILP(harm="emq").allocate(measured)
    assert measured.feasible(genome)

    (path,) = (tmp_path / "mq_bench").glob("*.json")
    bench = read_bench(path, problem)
    scored = evaluator.score(bench.genomes[:3], split="search", windows=_windows(evaluator), fitness=[KL()])["kl"]
    assert bench.kl[:3] == pytest.approx(scored, rel=1e-5)

    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(evaluator.resources, "mq_bench", path)
    heard = Heard()
    again, _ = measure(EMQ, evaluator, problem, tokens=32, seed=0, progress=heard)
    assert said in heard.lines and not (tmp_path / "other" / "mq_bench").exists()
    for unit in problem.units:
        for level in unit.level_names:
            assert again[unit.name][f"{EMQ}/{level}"] == columns[unit.name][f"{EMQ}/{level}"]
    heard = Heard()
    assert measure(EMQ, evaluator, problem, tokens=32, seed=0, progress=heard)[0] == again
    assert heard.lines[0] == "emq found" and said in heard.lines


def _windows(evaluator: Evaluator) -> list[int]:
    from evosweep.core.seeds import generator

    windows = evaluator.splits["search"].windows
    return generator(0, "emq windows").choice(len(windows), 1, replace=False).tolist()


def test_a_named_proxy_that_is_constant_is_refused_by_name(problem) -> None:
    genomes = bench_genomes(problem, 20, seed=0)
    bench = Bench(genomes, np.arange(20.0))
    bits = problem.costs / problem.numels[:, None]
    tables = {"bits_per_weight": bits, "flat": np.zeros(problem.costs.shape), "half": bits**2}
    heard = Heard()
    ranked, usable = ranking(tables, bench, heard)
    assert set(ranked) == {"half"} and set(usable) == {"half", "bits_per_weight"}
    assert heard.lines == ["proxy flat is constant over the 20 scored allocations: it ranks nothing; it is left out"]
    with pytest.raises(EvosweepError, match="proxy flat is constant"):
        ranking(tables, bench, Silent(), names=["flat"])


def test_a_bench_of_another_problem(problem, tmp_path) -> None:
    bench = Bench(bench_genomes(problem, 5, seed=0), np.array([0.1, 0.2, np.nan, 0.4, 0.5]))
    path = write_bench(tmp_path / "bench.json", problem, bench)
    again = read_bench(path, problem)
    assert len(again) == 4 and again.genomes.tolist() == bench.genomes[[0, 1, 3, 4]].tolist()
    value = json.loads(path.read_text())
    value["levels"][3] = ["2bit", "8bit"]
    path.write_text(json.dumps(value))
    with pytest.raises(
        EvosweepError, match=r"bench of another problem: .* has levels 2bit, 8bit there, levels 2bit, 3"
    ):
        read_bench(path, problem)
    path.write_text("[]")
    with pytest.raises(EvosweepError, match=r"bench\.json is no bench of scored allocations"):
        read_bench(path, problem)
    with pytest.raises(SettingError, match="mq_bench must be a file that exists, or null, got '/none'"):
        Resources(mq_bench="/none")
