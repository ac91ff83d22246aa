"""What is read from backward passes, against plain float64 versions."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp

from evosweep.allocators.harm import AUTO_QUANTIZE, AUTO_SCHEME, FISHER
from evosweep.allocators.ilp import ILP
from evosweep.core.events import Silent
from evosweep.evaluate.gradient_scores import absolute_products, output_squares, squared_products
from evosweep.evaluate.gradients import falling
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure
from evosweep.models.anatomy import Anatomy

PLACES = [0, 5, 9]


@pytest.fixture(scope="module")
def double(anatomy: Anatomy) -> torch.nn.Module:
    model = copy.deepcopy(anatomy.model).double().requires_grad_(True)
    model.set_attn_implementation("eager")  # which has all derivatives
    return model


@pytest.fixture(scope="module")
def ids(splits: dict) -> torch.Tensor:
    return torch.from_numpy(splits["search"].windows[:2, :8])


def change(evaluator: Evaluator, place: int, level: int) -> torch.Tensor:
    """Return what a level changes in a weight, in float64."""
    return evaluator.weight(place, level).double() - evaluator.anatomy.slots[place].read().double()


def logits_at(model: torch.nn.Module, name: str, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    values = {f"{name}.weight": weight}
    return functional_call(model, values, kwargs={"input_ids": ids, "use_cache": False}).logits.flatten(0, 1)


def second_order_kl(model: torch.nn.Module, name: str, delta: torch.Tensor, ids: torch.Tensor) -> float:
    """Return ½ Σ Var_p(J ΔW) over tokens: the KL's second-order term, exactly, without labels."""
    dense = model.get_parameter(f"{name}.weight").detach()
    logits, slope = jvp(lambda weight: logits_at(model, name, weight, ids), (dense,), (delta,))
    p = logits.softmax(-1)
    mean = (p * slope).sum(-1, keepdim=True)
    return 0.5 * float((p * (slope - mean).square()).sum().detach())


@pytest.mark.parametrize("place", PLACES)
def test_a_squared_product_is_that_of_float64(evaluator: Evaluator, double, ids, place: int) -> None:
    slot = evaluator.anatomy.slots[place]
    found = squared_products(evaluator, [slot], ids, {"seed": 3})[0]
    logits = double(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    rng = torch.Generator().manual_seed(3)
    labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=rng)[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, double.get_parameter(f"{slot.name}.weight"))
    expected = [float((gradient * change(evaluator, place, level)).sum() ** 2) for level in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_fisher_is_the_second_order_term_of_the_kl(evaluator: Evaluator, double, ids, place: int) -> None:
    slot = evaluator.anatomy.slots[place]
    draws = [squared_products(evaluator, [slot], ids, {"seed": seed})[0] for seed in range(400)]
    found = 0.5 * torch.stack(draws).mean(0)
    expected = [second_order_kl(double, slot.name, change(evaluator, place, level), ids) for level in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=0.25)  # 400 squares of a Gaussian: 7 % of standard error


@pytest.mark.parametrize("place", PLACES)
def test_an_output_square_is_that_of_float64(evaluator: Evaluator, double, ids, place: int) -> None:
    """ModelOpt's sum: squared gradient of the text's loss in a layer's outputs x squared change of the outputs."""
    slot = evaluator.anatomy.slots[place]
    found = output_squares(evaluator, [slot], ids, {})[0]
    module = double.get_submodule(slot.name)
    kept = {}
    hook = module.register_forward_hook(lambda _m, args, output: kept.update(x=args[0], y=output))
    logits = double(input_ids=ids, use_cache=False).logits
    hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, kept["y"])
    changed = [kept["x"] @ change(evaluator, place, level).T for level in range(3)]
    expected = [float((gradient * output).square().sum().detach()) for output in changed]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("level", [0, 2])
def test_an_absolute_product_is_that_of_float64(evaluator: Evaluator, double, ids, level: int) -> None:
    """AutoScheme's sum, in a model whose layers are all at the level."""
    slots = evaluator.anatomy.slots
    before = [slot.read().clone() for slot in slots]
    found = absolute_products(evaluator, slots, ids, {"level": level})
    model = copy.deepcopy(double)
    with torch.no_grad():
        for place, slot in enumerate(slots):
            model.get_parameter(f"{slot.name}.weight").copy_(evaluator.weight(place, level))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    expected = [
        float((model.get_parameter(f"{slot.name}.weight").grad * change(evaluator, place, level)).abs().sum())
        for place, slot in enumerate(slots)
    ]
    assert found[:, level].tolist() == pytest.approx(expected, rel=1e-3)
    assert (np.delete(found.numpy(), level, axis=1) == 0).all()
    for slot, weight in zip(slots, before, strict=True):
        assert torch.equal(slot.read(), weight)


@pytest.mark.parametrize("column", [FISHER, AUTO_QUANTIZE, AUTO_SCHEME])
def test_the_ilp_reads_what_was_measured(
    column: str, evaluator: Evaluator, store, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    columns, tokens = measure(column, evaluator, problem, tokens=64, seed=0, progress=Silent())
    assert tokens == 64 * len(problem.units)
    units = [type(unit)(**{**vars(unit), "columns": {**unit.columns, **columns[unit.name]}}) for unit in problem.units]
    measured = type(problem)(units=tuple(units), budget=problem.budget)
    genome = ILP(harm=column).allocate(measured)
    harms = np.array([[columns[unit.name][f"{column}/{level.name}"] for level in unit.levels] for unit in units])
    assert (harms > 0).all() and measured.feasible(genome)
    assert column != AUTO_QUANTIZE or (np.diff(harms, axis=1) <= 0).all()
    rows = np.arange(len(units))
    assert harms[rows, genome].sum() < harms[rows, problem.uniform()].sum()
    for slot in evaluator.anatomy.slots:
        assert not slot.parameter.requires_grad and slot.parameter.grad is None


def test_a_dearer_level_is_no_worse_than_a_cheaper_one() -> None:
    """ModelOpt's candidate statistics: min(score, score of the level before)."""
    assert falling({"a/2": 3.0, "a/3": 4.0, "a/4": 1.0}) == {"a/2": 3.0, "a/3": 3.0, "a/4": 1.0}


@pytest.mark.parametrize("score", [squared_products, output_squares])
def test_blocks_that_do_not_fit_run_twice_and_give_the_same(score, evaluator: Evaluator, ids, monkeypatch) -> None:
    slots = evaluator.anatomy.slots
    runs = []
    hook = evaluator.anatomy.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    whole = score(evaluator, slots, ids, {"seed": 1})
    assert len(runs) == 1
    monkeypatch.setattr("evosweep.evaluate.backward.free_bytes", lambda _: 1.0)
    mlp = evaluator.anatomy.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    again = score(evaluator, slots, ids, {"seed": 1})
    hook.remove()
    mlp.remove()
    assert len(runs) == 4  # the block once, its MLP a second time in its own turn
    assert torch.equal(whole, again) and "forward" not in vars(evaluator.anatomy.blocks[0])
