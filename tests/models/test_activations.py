"""Inputs of layers in eight bits: against float64, once for a shared input, and wherever candidates are scored."""

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.uncompressed import NoCompression
from evosweep.core.errors import SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.evaluate.continuations import applied
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.models.activations import INPUT_RANGE, RoundedInputs, rounded
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.models.transforms.smooth import Smooth, measured
from evosweep.models.transforms.wiring import find_wiring
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.models.test_anatomy import small

E4M3 = sorted(
    {0.0}
    | {mantissa / 8 * 2.0**-6 for mantissa in range(1, 8)}
    | {
        (1 + mantissa / 8) * 2.0**power
        for power in range(-6, 9)
        for mantissa in range(8)
        if (power, mantissa) != (8, 7)
    }
)


def reference(values: np.ndarray, form: str, largest: np.ndarray) -> np.ndarray:
    """Return the nearest points, in float64, of a grid that is scaled to ``largest``."""
    grid = np.arange(128.0) if form == "int8" else np.array(E4M3)
    scale = largest / grid[-1]
    scaled = np.minimum(np.abs(values) / scale, grid[-1])
    nearest = grid[np.abs(scaled[..., None] - grid).argmin(-1)]
    return np.sign(values) * nearest * scale


@pytest.mark.parametrize("form", ["int8", "fp8"])
class TestRounded:
    def values(self) -> torch.Tensor:
        values = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(0))
        return values * torch.logspace(-3, 3, 7)[:, None]

    def test_every_token_has_its_own_scale(self, form: str) -> None:
        values = self.values()
        exact = values.double().numpy()
        wanted = reference(exact, form, np.abs(exact).max(-1, keepdims=True))
        found = rounded(values, form).double().numpy()
        assert np.isclose(found, wanted, rtol=1e-5).mean() > 0.995  # values between two points may fall to either
        step = np.abs(exact).max(-1, keepdims=True) / (127 if form == "int8" else 14)
        assert (np.abs(found - exact) <= 0.51 * step).all()

    def test_one_scale_for_all_tokens_clamps(self, form: str) -> None:
        values = self.values()
        wanted = reference(values.double().numpy(), form, np.array(2.0))
        found = rounded(values, form, 2.0).double().numpy()
        assert np.isclose(found, wanted, rtol=1e-5).mean() > 0.995 and np.abs(found).max() == pytest.approx(2.0)

    def test_zeros_stay_zeros_and_the_type_is_kept(self, form: str) -> None:
        found = rounded(torch.zeros(2, 8, dtype=torch.bfloat16), form)
        assert found.dtype == torch.bfloat16 and not found.any()


def test_layers_that_share_an_input_are_given_one_tensor() -> None:
    layers = {name: torch.nn.Linear(8, 4) for name in "qkv"}
    seen = []
    for layer in layers.values():
        layer.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    values = torch.randn(3, 8)
    with RoundedInputs("int8").of_layers(layers):
        for layer in layers.values():
            layer(values)
    layers["q"](values)
    assert seen[0] is seen[1] is seen[2] and torch.equal(seen[0], rounded(values, "int8"))
    assert seen[3] is values


class TestScoring:
    """A tiny model whose layers stay as they are, or have levels."""

    @pytest.fixture(scope="class")
    def ranged(self, anatomy, splits):
        plan = plan_store(anatomy, GPTQ(bits=[4, 8], group=16))
        return StoreBuilder(input_ranges=True).open(plan, splits["calibration"], model_name="tiny")

    @pytest.fixture(scope="class")
    def make(self, anatomy, splits):
        def make(store, activations: str) -> Evaluator:
            resources = Resources(activations=activations)
            return Evaluator(anatomy=anatomy, store=store, splits=splits, resources=resources)

        return make

    def kl(self, evaluator: Evaluator, genomes) -> np.ndarray:
        return evaluator.score(genomes, split="search", windows=[0, 1], fitness=[KL()])["kl"]

    def test_a_population_scores_as_each_alone(self, make, ranged, anatomy, splits) -> None:
        """Rows with different levels share a batch; the same with weights swapped in and inputs rounded by hand."""
        genomes = np.random.default_rng(0).integers(0, 2, (4, len(ranged.units)))
        evaluator = make(ranged, "int8")
        tokens = torch.from_numpy(splits["search"].windows[:2])
        with torch.inference_mode():
            dense = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for genome, found in zip(genomes, self.kl(evaluator, genomes), strict=True):
            with torch.inference_mode(), applied(evaluator, genome):
                ours = anatomy.model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            assert found == pytest.approx(float((dense.exp() * (dense - ours)).sum(-1).mean()), rel=0.02)

    def test_the_dense_model_is_never_rounded(self, make, ranged) -> None:
        exact = make(ranged, "none")
        for activations in ("int8", "fp8", "int8_static", "fp8_static"):
            evaluator = make(ranged, activations)
            assert np.array_equal(self.kl(evaluator, None), self.kl(exact, None))
            assert self.kl(evaluator, np.ones((1, len(ranged.units)), dtype=int))[0] != self.kl(exact, None)[0]

    def test_eight_bits_of_activations_cost_little_beside_four_of_weights(self, make, ranged) -> None:
        four, eight = np.zeros((1, len(ranged.units)), dtype=int), np.ones((1, len(ranged.units)), dtype=int)
        w8a8, w4a8 = (self.kl(make(ranged, "int8"), genome)[0] for genome in (eight, four))
        w8a16, w4a16 = (self.kl(make(ranged, "none"), genome)[0] for genome in (eight, four))
        assert w8a16 < w8a8 < w4a16 and abs(w4a8 - w4a16) < 0.5 * w4a16

    def test_layers_that_stay_as_they_are_and_dropped_blocks(self, make, anatomy, splits) -> None:
        plan = plan_store(anatomy, NoCompression(), Drop(granularity="blocks"))
        store = StoreBuilder().open(plan, splits["calibration"], model_name="tiny")
        genomes = np.array([[1, 1], [0, 1]])
        exact, changed = (self.kl(make(store, activations), genomes) for activations in ("none", "int8"))
        assert exact[0] == pytest.approx(0, abs=1e-6)
        assert np.isfinite(changed).all()

    def test_ranges_are_the_largest_inputs(self, ranged, anatomy, splits) -> None:
        seen = {}
        slot = anatomy.slots[0]
        with slot.watch_inputs(lambda values: seen.update(largest=float(values.abs().max()))):
            anatomy.model(input_ids=torch.from_numpy(splits["calibration"].windows), use_cache=False)
        assert ranged.units[0].columns[INPUT_RANGE] == pytest.approx(seen["largest"], rel=1e-5)
        assert all(unit.columns[INPUT_RANGE] > 0 for unit in ranged.units)

    def test_static_scales_need_ranges(self, make, store) -> None:
        with pytest.raises(SettingError) as caught:
            make(store, "int8_static")
        message = str(caught.value)
        assert message.startswith("activations must be none or int8, fp8 (a scale for each token) with a level store")
        assert "store.input_ranges=true" in message and "\n" not in message

    @pytest.mark.parametrize("activations", ["int8", "fp8_static"])
    def test_an_export_is_proved_with_rounded_inputs(self, make, ranged, loaded, tmp_path, activations: str) -> None:
        evaluator = make(ranged, activations)
        genome = np.arange(len(ranged.units)) % 2
        problem = Problem(units=ranged.units, budget=sum(unit.levels[-1].cost for unit in ranged.units))
        folder = tmp_path / "model"
        facts = PackedSafetensors(check_tokens=16).export(
            genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=folder
        )
        assert facts["activations"] == activations
        assert f"rounded to {activations}" in (folder / "README.md").read_text()
        tokens = torch.from_numpy(evaluator.splits["validation"].windows[:1, :16])
        rounded_logits = evaluator.logits(genome, tokens)
        with evaluator.exact_inputs():
            assert not torch.allclose(rounded_logits, evaluator.logits(genome, tokens), atol=1e-4)
        assert torch.equal(rounded_logits, evaluator.logits(genome, tokens))


class TestSmooth:
    """A model whose norms give two columns that are much larger than the others, as those of language models do."""

    def spiky(self, family: str, **settings):
        model = small(family, **settings)
        for module in model.modules():
            if "Norm" in type(module).__name__ and module.weight.shape == (32,):
                with torch.no_grad():
                    module.weight[3] += 60.0
                    module.weight[17] += 30.0
        return model.requires_grad_(False)

    def text(self) -> torch.Tensor:
        return torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(
        ("family", "settings"),
        [("llama", {}), ("gemma", {"head_dim": 8}), ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4})],
    )
    def test_logits_stay_and_rounding_costs_less(self, family: str, settings) -> None:
        model = self.spiky(family, **settings)
        text = self.text()
        layers = {slot.name: slot.module for slot in Anatomy(model).slots}

        def logits(*, int8: bool) -> torch.Tensor:
            with torch.inference_mode(), RoundedInputs("int8").of_layers(layers if int8 else {}):
                return model(input_ids=text, use_cache=False).logits.clone()

        exact, before = logits(int8=False), logits(int8=True)
        Smooth().calibrate(LoadedModel(family, model, None), text, progress=Silent())
        assert torch.allclose(logits(int8=False), exact, atol=1e-4 * float(exact.abs().max()))
        assert (logits(int8=True) - exact).norm() < 0.8 * (before - exact).norm()

    def test_norms_are_found_in_bfloat16(self) -> None:
        model = self.spiky("llama").bfloat16()
        norm = model.model.layers[0].input_layernorm
        before = norm.weight.clone()
        Smooth().calibrate(LoadedModel("llama", model, None), self.text(), progress=Silent())
        assert norm.weight.dtype == torch.bfloat16 and norm.weight[3] < 0.5 * before[3]

    def test_scales_are_those_of_the_paper(self) -> None:
        """Equation 4: afterwards a column's largest input is max|X|^(1-a) · max|W|^(1-a)."""
        model = self.spiky("llama")
        text = self.text()
        norm = model.model.layers[0].input_layernorm
        readers = [getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv"]
        (found,) = [one for one in find_wiring(model).norms if one.module is norm]
        inputs = measured(model, [found], text)[found.name]
        weights = torch.stack([layer.weight.abs().amax(0) for layer in readers]).amax(0)
        Smooth(alpha=0.75).calibrate(LoadedModel("llama", model, None), text, progress=Silent())
        smoothed = measured(model, [found], text)[found.name]
        assert torch.allclose(smoothed, (inputs * weights) ** 0.25, rtol=1e-3)

    def test_a_share_beyond_one(self) -> None:
        with pytest.raises(SettingError, match="alpha must be a number from 0 to 1, got 2"):
            Smooth(alpha=2)
