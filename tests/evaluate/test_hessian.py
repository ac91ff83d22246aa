"""Products with the Hessian, top eigenvalues and traces, against the whole Hessian in float64."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from evosweep.allocators.harm import HAWQ, HAWQ_HUTCHINSON, HAWQ_TOP, ORDER
from evosweep.core.events import Silent
from evosweep.evaluate.gradient_scores import squares
from evosweep.evaluate.hessian import Curvature, chunks_of, hutchinson, input_products, top_eigenvalue
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.population import Evaluator
from evosweep.evaluate.sensitivity import measure
from evosweep.models.anatomy import Anatomy
from evosweep.models.fused import compile_norms

PLACES = [1, 9]  # a key and a value projection: 512 weights each


@pytest.fixture(scope="module")
def ids(splits: dict) -> torch.Tensor:
    return torch.from_numpy(splits["search"].windows[:1, :6])


@pytest.fixture(scope="module")
def hessians(anatomy: Anatomy, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """The whole Hessian of the KL in some layers' weights: Σ Jᵀ (diag p − p pᵀ) J over tokens."""
    model = copy.deepcopy(anatomy.model).double()
    model.set_attn_implementation("eager")

    def whole(place: int) -> torch.Tensor:
        name = f"{anatomy.slots[place].name}.weight"
        dense = model.get_parameter(name).detach()

        def logits(weight: torch.Tensor) -> torch.Tensor:
            return functional_call(model, {name: weight}, kwargs={"input_ids": ids, "use_cache": False}).logits[0]

        slope = jacrev(logits, chunk_size=256)(dense).flatten(2)
        p = logits(dense).softmax(-1)
        mean = torch.einsum("tv,tvw->tw", p, slope)
        return torch.einsum("tv,tvw,tvx->wx", p, slope, slope) - mean.T @ mean

    return {place: whole(place).detach() for place in PLACES}


@pytest.mark.parametrize("place", PLACES)
def test_a_product_is_that_of_the_whole_hessian(anatomy: Anatomy, ids, hessians, place: int) -> None:
    slots = [anatomy.slots[place], anatomy.slots[place + 1]]
    vector = torch.randn(slots[0].shape, generator=torch.Generator().manual_seed(1))
    found = Curvature(anatomy, slots, ids).product({0: vector})[0].double().flatten()
    expected = hessians[place] @ vector.double().flatten()
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert not slots[0].parameter.requires_grad and slots[0].parameter.grad is None


def test_norms_that_are_compiled_are_differentiated_twice(anatomy: Anatomy, ids) -> None:
    slots = [anatomy.slots[PLACES[0]]]
    model = copy.deepcopy(anatomy.model)
    compiled = Anatomy(model)
    compile_norms(compiled.blocks)
    with torch.enable_grad():  # compiled code is made for gradients, as by a measurement before
        model(input_ids=ids, use_cache=False)
    vector = {0: torch.ones(slots[0].shape)}
    plain = Curvature(anatomy, slots, ids).product(vector)[0]
    assert torch.equal(Curvature(compiled, [compiled.slots[PLACES[0]]], ids).product(vector)[0], plain)
    norm = next(module for name, module in model.named_modules() if name.endswith("input_layernorm"))
    assert "forward" in vars(norm)  # compiled again


@pytest.mark.parametrize("place", PLACES)
def test_the_top_eigenvalue_is_that_of_the_whole_hessian(anatomy: Anatomy, ids, hessians, place: int) -> None:
    expected = float(torch.linalg.eigvalsh(hessians[place])[-1])
    curvature = Curvature(anatomy, [anatomy.slots[place]], ids)
    assert top_eigenvalue(curvature, 0, iterations=60, seed=0) == pytest.approx(expected, rel=1e-3)
    assert 0.5 * expected < top_eigenvalue(curvature, 0, iterations=6, seed=0) <= expected * (1 + 1e-4)


def test_signs_give_the_trace_on_average(anatomy: Anatomy, ids, hessians) -> None:
    slots = [anatomy.slots[place] for place in PLACES]
    found = torch.stack([hutchinson(anatomy, slots, ids, seed) for seed in range(60)])
    for column, place in enumerate(PLACES):
        error = float(found[:, column].std()) / 60**0.5
        assert abs(float(found[:, column].mean()) - float(hessians[place].trace())) < 3.5 * error


def test_squared_gradients_give_the_trace_on_average(evaluator: Evaluator, ids, hessians) -> None:
    """What hawq_v2 measures without second derivatives: E |∇ log p(y)|² at labels of the model's own."""
    slots = [evaluator.anatomy.slots[place] for place in PLACES]
    found = torch.stack([squares(evaluator, slots, ids, {"seed": seed}) for seed in range(150)])
    for column, place in enumerate(PLACES):
        error = float(found[:, column].std()) / 150**0.5
        assert abs(float(found[:, column].mean()) - float(hessians[place].trace())) < 3.5 * error


def test_chunks_are_whole_blocks(anatomy: Anatomy) -> None:
    slots = anatomy.slots
    assert chunks_of(slots) == [list(range(14))]
    assert chunks_of(slots, most=1) == [list(range(7)), list(range(7, 14))]


@pytest.mark.parametrize("column", [HAWQ, HAWQ_HUTCHINSON, HAWQ_TOP])
def test_harm_is_half_the_curvature_times_the_squared_change(
    column: str, evaluator: Evaluator, store, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    columns, tokens = measure(column, evaluator, problem, tokens=64, seed=0, progress=Silent())
    assert tokens == len(problem.units) * (6 * 3 * 32 if column == HAWQ_TOP else 64)
    for index, unit in enumerate(problem.units):
        dense = evaluator.anatomy.slots[index].read()
        errors = [float((evaluator.weight(index, level) - dense).square().sum()) for level in range(3)]
        harms = [columns[unit.name][f"{column}/{level.name}"] for level in unit.levels]
        whole = columns[unit.name][f"{column}{ORDER}"] * (unit.numel if column == HAWQ_TOP else 1)
        assert harms == pytest.approx(0.5 * whole * np.array(errors), rel=1e-5) and whole > 0


@pytest.mark.parametrize("place", [1, 9])
def test_signs_on_inputs_give_the_trace_of_the_hessian_in_them(anatomy: Anatomy, ids, place: int) -> None:
    """Against the whole Hessian in the inputs of one layer, in float64; other layers' inputs are there, too."""
    slots = [anatomy.slots[place], anatomy.slots[place + 1], anatomy.slots[12]]
    model = copy.deepcopy(anatomy.model).double()
    model.set_attn_implementation("eager")
    module = model.get_submodule(slots[0].name)
    kept = []
    hook = module.register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    inputs = kept[0]

    def logits(values: torch.Tensor) -> torch.Tensor:
        hook = module.register_forward_pre_hook(lambda *_: (values,))
        found = model(input_ids=ids, use_cache=False).logits[0]
        hook.remove()
        return found

    slope = jacrev(logits, chunk_size=256)(inputs).flatten(2)
    p = logits(inputs).softmax(-1)
    mean = torch.einsum("tv,tvw->tw", p, slope)
    trace = float((torch.einsum("tv,tvw->", p, slope.square()) - mean.square().sum()).detach())
    draws = torch.tensor([input_products(anatomy, slots, ids, seed)[0][1] for seed in range(60)])
    assert abs(float(draws.mean()) - trace) < 3.5 * float(draws.std()) / 60**0.5
    found = input_products(anatomy, slots, ids, 0)[0][0]
    assert torch.allclose(found.double(), inputs, atol=1e-5)


def test_rounded_inputs_add_the_same_to_every_level(
    anatomy: Anatomy, store, splits, make_store_problem, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    problem = make_store_problem(store)
    found = {}
    for activations in ("none", "int8"):
        evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits, resources=Resources(activations=activations))
        found[activations], _ = measure(HAWQ_HUTCHINSON, evaluator, problem, tokens=64, seed=0, progress=Silent())
    for unit in problem.units:
        names = [f"{HAWQ_HUTCHINSON}/{level}" for level in unit.level_names]
        added = [found["int8"][unit.name][name] - found["none"][unit.name][name] for name in names]
        assert added[0] > 0 and added == pytest.approx([added[0]] * 3, rel=1e-6)
