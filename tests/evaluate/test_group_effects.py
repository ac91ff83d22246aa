"""Interactions and entropies against plain float64 versions."""

import copy

import numpy as np
import pytest
import torch

from evosweep.allocators.interactions import PAIRS
from evosweep.core.events import Silent
from evosweep.core.seeds import generator
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure
from evosweep.search.block_groups import ENTROPY


def test_interactions_are_those_of_float64(
    evaluator: Evaluator, store, splits: dict, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    columns, tokens = measure(PAIRS["blocks"], evaluator, problem, tokens=64, seed=0, progress=Silent())
    blocks = sorted({unit.block for unit in problem.units})
    assert tokens == (2 + len(blocks) + len(blocks) * (len(blocks) - 1) // 2) * 64
    windows = splits["search"].windows
    chosen = generator(0, "sensitivity").choice(len(windows), 64 // windows.shape[1], replace=False)
    ids = torch.from_numpy(windows[chosen])
    dense = copy.deepcopy(evaluator.anatomy.model).double()
    uniform = problem.uniform()

    def kl(lowered: set[int]) -> float:
        other = copy.deepcopy(dense)
        with torch.no_grad():
            for index, unit in enumerate(problem.units):
                level = uniform[index] if unit.block in lowered else problem.sizes[index] - 1
                other.get_parameter(f"{unit.name}.weight").copy_(evaluator.weight(index, int(level)))
            p, q = (each(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for each in (dense, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    none = kl(set())
    first, second = blocks[:2]
    alone = {block: kl({block}) - none for block in (first, second)}
    unit = next(unit for unit in problem.units if unit.block == first)
    mine = columns[unit.name]
    name = PAIRS["blocks"]
    scale = alone[first] + alone[second]
    assert mine[f"{name}/{first}"] == pytest.approx(alone[first], rel=0.02)
    beyond = kl({first, second}) - none - scale
    assert mine[f"{name}/{second}"] == pytest.approx(beyond, abs=0.02 * scale)


def test_entropies_are_those_of_a_histogram(
    evaluator: Evaluator, store, splits: dict, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    columns, _ = measure(ENTROPY, evaluator, problem, tokens=32, seed=0, progress=Silent())
    windows = splits["search"].windows
    [window] = generator(0, "sensitivity").choice(len(windows), 1, replace=False)
    slot = evaluator.anatomy.slots[3]
    seen: list[np.ndarray] = []
    handle = slot.watch_inputs(lambda inputs: seen.append(inputs.detach().double().numpy().ravel()))
    evaluator.anatomy.model(input_ids=torch.from_numpy(windows[[window]]), use_cache=False)
    handle.remove()
    counts, _ = np.histogram(seen[0], bins=256)
    shares = counts[counts > 0] / counts.sum()
    unit = next(unit for unit in problem.units if unit.name == slot.name)
    assert columns[unit.name][ENTROPY] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-3)
