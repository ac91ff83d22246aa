"""Bias tuning on the tiny model, and through the command line."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mlflow import MlflowClient

from evosweep import load_packed
from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.core.results import read_result
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.base import Winner
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.finish import bias_tuning
from evosweep.finish.base import TUNED
from evosweep.finish.bias_tuning import BiasTuning
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import Random
from evosweep.models.patch import replaced_parameters
from evosweep.testing.tiny import tiny_config, tiny_model, tiny_splits
from evosweep.workbench import Workbench
from tests.cli import TINY, evosweep, workplace

STEPS = {"steps": 30, "tokens": 128, "rate": 0.02}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    loaded = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Workbench(loaded=loaded, splits=tiny_splits(loaded), compressor=GPTQ(bits=[2, 3], group=16))


@pytest.fixture(scope="module")
def problem(bench: Workbench) -> Problem:
    units = bench.store.units
    return Problem(units=units, budget=sum(unit.levels[-1].cost for unit in units), fixed_bits=bench.store.fixed_bits)


@pytest.fixture(scope="module")
def genome(problem: Problem) -> Any:
    return np.zeros(len(problem.units), dtype=np.int64)


@pytest.fixture(scope="module")
def done(bench: Workbench, problem: Problem, genome: Any) -> Any:
    before = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in bench.loaded.model.parameters()]
    done = BiasTuning(**STEPS).run(genome, problem=problem, evaluator=bench.evaluator, seed=0, progress=Silent())
    after = bench.loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in bench.loaded.model.parameters()] == asked
    return done


def test_held_out_kl_falls(done: Any) -> None:
    assert done.facts["accepted"] and done.facts["added_bits"] == 0
    assert done.facts["kl_after"] < 0.98 * done.facts["kl_before"]
    assert set(done.tuned) == {
        "model.norm.weight",
        *(f"model.layers.{n}.{kind}_layernorm.weight" for n in (0, 1) for kind in ("input", "post_attention")),
    }


def test_the_figures_are_those_of_the_tuned_model(bench: Workbench, problem: Problem, genome: Any, done: Any) -> None:
    windows = range(len(bench.splits["validation"].windows))
    score = {"split": "validation", "windows": windows, "fitness": [KL()]}
    fresh = Evaluator(anatomy=bench.anatomy, store=bench.store, splits=bench.splits)
    with fresh.tuned(done.tuned):
        inside = fresh.score(genome[None], **score)["kl"][0]
        assert fresh.score(None, **score)["kl"][0] == pytest.approx(0, abs=1e-5)  # the dense model keeps its own
    assert inside == pytest.approx(done.facts["kl_after"], rel=1e-4)
    assert fresh.score(genome[None], **score)["kl"][0] == pytest.approx(done.facts["kl_before"], rel=1e-4)


def test_the_gradient_is_that_of_the_kl(bench: Workbench, problem: Problem, genome: Any) -> None:
    """One tiny step changes the loss by the gradient that autograd finds through whole logits."""
    winner = Winner(genome, problem, bench.evaluator)
    windows = bench.splits["calibration"].windows
    tokens = torch.from_numpy(windows[:2])
    parameters = BiasTuning().parameters(bench.anatomy)
    bench.anatomy.forget_contexts()
    targets = bias_tuning._targets(bench.anatomy, windows, [0, 1])
    model = bench.loaded.model
    with torch.no_grad():
        dense = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    with bias_tuning._compressed(winner), bias_tuning._learnable(model, parameters):
        loss = bias_tuning._backward(winner, tokens, [targets[0], targets[1]])
        found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        with torch.enable_grad():
            logits = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
            expected = (dense.exp() * (dense - logits)).sum(-1).mean()
            expected.backward()
        assert loss == pytest.approx(float(expected), rel=1e-3)
        for name, parameter in parameters.items():
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
            parameter.grad = None


@pytest.mark.parametrize("kind", [DenseSafetensors, PackedSafetensors])
def test_exports_hold_the_tuned_parameters(
    kind: Any, bench: Workbench, problem: Problem, genome: Any, done: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    with replaced_parameters(bench.loaded.model, done.tuned):
        kind().export(genome, problem=problem, evaluator=bench.evaluator, loaded=bench.loaded, folder=folder)
    load = load_packed if kind is PackedSafetensors else transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder).eval()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in done.tuned.items())
    tokens = torch.from_numpy(bench.splits["validation"].windows[:1])
    with torch.no_grad(), bench.evaluator.tuned(done.tuned):
        assert torch.allclose(model(input_ids=tokens).logits[0], bench.evaluator.logits(genome, tokens), atol=1e-4)


def test_what_is_no_better_is_dropped(bench: Workbench, problem: Problem, genome: Any) -> None:
    wild = BiasTuning(steps=3, tokens=64, rate=1.0)
    done = wild.run(genome, problem=problem, evaluator=bench.evaluator, seed=0, progress=Silent())
    assert not done.facts["accepted"] and not done.tuned
    assert done.facts["kl_after"] == done.facts["kl_before"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"tokens": 0}, "tokens must be"),
        ({"rate": 0}, "rate must be"),
        ({"learn": []}, "learn must be"),
        ({"learn": ["norm"]}, "did you mean"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        BiasTuning(**settings)


def test_a_model_without_biases_is_refused_where_only_those_may_be_learned(bench: Workbench) -> None:
    with pytest.raises(SettingError, match="learn must be something that this model has"):
        BiasTuning(learn=["biases"]).check(bench.anatomy)


def test_biases_are_learned_where_a_model_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    source = Random(name="biased", config=partial(tiny_config, attention_bias=True), spread=0.15, device="cpu")
    loaded = source.load(progress=Silent())
    bench = Workbench(loaded=loaded, splits=tiny_splits(loaded), compressor=GPTQ(bits=[2, 3], group=16))
    problem = Problem(units=bench.store.units, budget=10**9, fixed_bits=bench.store.fixed_bits)
    genome = np.zeros(len(problem.units), dtype=np.int64)
    tuning = BiasTuning(**STEPS, learn=["biases"])
    done = tuning.run(genome, problem=problem, evaluator=bench.evaluator, seed=0, progress=Silent())
    assert done.facts["kl_after"] < done.facts["kl_before"]
    assert len(done.tuned) == 8 and all(name.endswith("_proj.bias") for name in done.tuned)


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    config = partial(
        transformers.Gemma2Config,
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    loaded = Random(name="capped", config=config, spread=0.15, device="cpu").load(progress=Silent())
    with pytest.raises(SettingError, match="must be one of none, got 'bias_tuning'; this model's head is more than"):
        BiasTuning().check(Anatomy(loaded.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tuning = ["finish=bias_tuning", "finish.steps=20", "finish.rate=0.02", "compressor.bits=[2,3]", "report=none"]
    with workplace(tmp_path_factory.mktemp("run")) as place:
        assert evosweep("-m", *TINY, *tuning, "sampler=uniform,random", "budget.bits_per_weight=2.6") == 0
        yield place


def test_a_multirun_tunes_its_winner_alone(folder: Path) -> None:
    rows = [read_result(path) for path in folder.glob("runs/evosweep/*/*/result.json")]
    assert len(rows) == 2
    (tuned,) = [row for row in rows if row.get("finish")]
    assert tuned["export"] and tuned["finish"]["accepted"]
    assert tuned["finish"]["kl_after"] < tuned["finish"]["kl_before"] == pytest.approx(tuned["kl"], rel=1e-4)
    assert [path.parent.name for path in folder.rglob(TUNED)] == [Path(tuned["folder"]).name]
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    metrics = client.get_run(tuned["mlflow_run"]).data.metrics
    assert metrics["finish/kl_after"] == pytest.approx(tuned["finish"]["kl_after"])


def test_a_score_of_the_run_is_that_of_the_tuned_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = folder.rglob(TUNED)
    assert evosweep("score", str(path.parent)) == 0
    row = read_result(path.parent / "result.json")
    assert f'"kl": {row["finish"]["kl_after"]:.6f}'[:14] in capsys.readouterr().out
