"""What every compressor must do."""

import pytest
import torch

from evosweep.compressors.base import Compressor, decode, layer_error
from evosweep.core.files import digest


def gram_of(columns: int, *, tokens: int = 512, seed: int = 0, mixing: float = 0.5) -> torch.Tensor:
    """Return the second moment of inputs with a few strong directions, as activations have."""
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=draws) @ (
        torch.eye(columns) + mixing * torch.randn(columns, columns, generator=draws) / columns**0.5
    )
    return inputs.T @ inputs / tokens


class CompressorContract:
    """Subclass with ``make``."""

    shapes = ((24, 32), (8, 32))

    def make(self) -> Compressor:
        raise NotImplementedError

    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(1)
        return {f"layer_{n}": torch.randn(shape, generator=draws) for n, shape in enumerate(self.shapes)}

    @pytest.fixture
    def plans(self):
        return self.make().plan({f"layer_{n}": shape for n, shape in enumerate(self.shapes)})

    @pytest.fixture
    def payloads(self, weights, plans):
        return self.make().compress(weights, gram_of(32), plans)

    def test_makes_planned_levels_of_every_layer(self, weights, plans, payloads) -> None:
        assert set(payloads) == set(weights) == set(plans)
        for name in weights:
            planned = [plan.name for plan in plans[name]]
            assert list(payloads[name]) == [each for each in planned if self.offers(name, each, payloads)]
            assert planned[0] in payloads[name]

    def offers(self, unit: str, level: str, payloads) -> bool:
        """Whether a planned level must have been made."""
        return True

    def test_the_error_it_tells_is_what_its_weight_makes(self, weights, payloads) -> None:
        gram = gram_of(32)
        for name, weight in weights.items():
            for payload in payloads[name].values():
                measured = layer_error(weight - payload.weight, gram)
                told = payload.output_error(weight, gram)
                assert told == pytest.approx(measured, rel=2e-3, abs=1e-5 * layer_error(weight, gram))

    def test_costs_rise(self, plans) -> None:
        for ladder in plans.values():
            costs = [plan.cost for plan in ladder]
            assert len(costs) > 1 and costs == sorted(set(costs)) and all(isinstance(cost, int) for cost in costs)

    def test_the_planned_cost_is_what_the_payload_takes(self, plans, payloads) -> None:
        for name, ladder in plans.items():
            for plan in ladder:
                if plan.name not in payloads[name]:
                    continue
                parts = payloads[name][plan.name].parts
                assert sum(part.numel() * part.element_size() * 8 for part in parts.values()) == plan.cost

    def test_what_is_stored_decodes_to_what_was_made(self, payloads) -> None:
        for levels in payloads.values():
            for payload in levels.values():
                assert torch.equal(decode(payload.format, payload.parts, payload.meta), payload.weight)

    def test_errors_fall_as_cost_rises(self, weights, payloads) -> None:
        gram = gram_of(32)
        for name, weight in weights.items():
            errors = []
            for payload in payloads[name].values():
                difference = weight - payload.weight
                errors.append(layer_error(difference, gram))
            assert errors == sorted(errors, reverse=True)

    def test_inputs_that_are_always_zero_do_no_harm(self, weights, plans) -> None:
        gram = gram_of(32)
        gram[5], gram[:, 5] = 0, 0
        for name, levels in self.make().compress(weights, gram, plans).items():
            whole = layer_error(weights[name], gram)
            for payload in levels.values():
                assert torch.isfinite(payload.weight).all()
                measured = layer_error(weights[name] - payload.weight, gram)
                assert payload.output_error(weights[name], gram) == pytest.approx(measured, rel=2e-3, abs=1e-5 * whole)

    def test_layers_do_not_influence_each_other(self, weights, plans, payloads) -> None:
        alone = self.make().compress({"layer_1": weights["layer_1"]}, gram_of(32), plans)["layer_1"]
        for level, payload in alone.items():
            assert torch.equal(payload.weight, payloads["layer_1"][level].weight)

    def test_weights_are_left_as_they_were(self, weights, plans) -> None:
        before = {name: weight.clone() for name, weight in weights.items()}
        self.make().compress(weights, gram_of(32), plans)
        assert all(torch.equal(before[name], weights[name]) for name in weights)

    def test_settings_are_part_of_the_address(self) -> None:
        digest(self.make().describe())  # JSON-able
