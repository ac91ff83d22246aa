import numpy as np
import pytest
import torch

from evosweep.allocators.harm import HAWQ
from evosweep.core.events import Silent
from evosweep.evaluate.gradient_scores import squares
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure
from evosweep.models.anatomy import Anatomy

STEP = 1e-2


@pytest.mark.parametrize("place", [0, 6, 9])
def test_curvature_predicts_the_kl_of_random_changes(
    evaluator: Evaluator, anatomy: Anatomy, splits: dict, place: int
) -> None:
    """KL(dense || W + D) is ½ · trace / numel · ‖D‖² on average over directions D: nothing here knows of gradients."""
    slot = anatomy.slots[place]
    ids = torch.from_numpy(splits["search"].windows[:2, :8])
    trace = np.mean([squares(evaluator, [slot], ids, {"seed": seed})[0].item() for seed in range(300)])
    dense, rng = slot.read().clone(), torch.Generator().manual_seed(0)
    found, expected = [], []
    with torch.no_grad():
        target = anatomy.model(input_ids=ids).logits.flatten(0, 1).double().log_softmax(-1)
        for _ in range(300):
            change = STEP * dense.std() * torch.randn(dense.shape, generator=rng)
            slot.write(dense + change)
            logits = anatomy.model(input_ids=ids).logits.flatten(0, 1).double().log_softmax(-1)
            found.append(float((target.exp() * (target - logits)).sum()))
            expected.append(0.5 * trace / dense.numel() * float(change.square().sum()))
        slot.write(dense)
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.15)


def test_every_level_of_every_unit_has_its_harm(evaluator: Evaluator, store, make_store_problem, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    before = [slot.read().clone() for slot in evaluator.anatomy.slots]
    first, tokens = measure(HAWQ, evaluator, problem, tokens=64, seed=3, progress=Silent())
    assert tokens == 64 * len(problem.units)
    for unit in problem.units:
        harms = [first[unit.name][f"{HAWQ}/{level.name}"] for level in unit.levels]
        assert all(harm > 0 for harm in harms) and harms == sorted(harms, reverse=True)
    for slot, weight in zip(evaluator.anatomy.slots, before, strict=True):
        assert torch.equal(slot.read(), weight)
        assert not slot.module.weight.requires_grad and slot.module.weight.grad is None
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path / "other"))  # measured again, not read
    again, _ = measure(HAWQ, evaluator, problem, tokens=64, seed=3, progress=Silent())
    assert again == first
