"""What every compressor must do."""

import json

import pytest
import torch

from evosweep.compressors.base import Compressor, Statistics, identity, layer_error
from evosweep.compressors.payload import Layout
from evosweep.compressors.statistics import SECOND_MOMENT, SECOND_MOMENT_DIAGONAL
from evosweep.core.errors import StoreError
from evosweep.core.files import digest


def gram_of(columns: int, *, tokens: int = 512, seed: int = 0, mixing: float = 0.5) -> torch.Tensor:
    """Return the second moment of inputs with a few strong directions, as activations have."""
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=draws) @ (
        torch.eye(columns) + mixing * torch.randn(columns, columns, generator=draws) / columns**0.5
    )
    return inputs.T @ inputs / tokens


def statistics_of(gram: torch.Tensor) -> Statistics:
    """Return everything that a second moment says about an input."""
    return Statistics({SECOND_MOMENT: gram, SECOND_MOMENT_DIAGONAL: gram.diagonal()})


def made_by(compressor: Compressor, weights: dict[str, torch.Tensor], gram: torch.Tensor):
    """Return unit -> level name -> payload of every level that a compressor plans for some weights."""
    plans = compressor.plan({name: tuple(weight.shape) for name, weight in weights.items()})
    return compressor.compress(weights, statistics_of(gram).only(compressor.needs), plans)


class CompressorContract:
    """Subclass with ``make``, and with ``measured`` where a compressor needs more than the second moment."""

    shapes = ((24, 32), (8, 32))

    def make(self) -> Compressor:
        raise NotImplementedError

    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(1)
        return {f"layer_{n}": torch.randn(shape, generator=draws) for n, shape in enumerate(self.shapes)}

    def measured(self, compressor: Compressor, gram: torch.Tensor) -> Statistics:
        """Return what ``compressor`` needs, and nothing else, of an input with this second moment."""
        return statistics_of(gram).only(compressor.needs)

    def compressed(self, weights, plans, gram: torch.Tensor | None = None):
        compressor = self.make()
        return compressor.compress(weights, self.measured(compressor, gram_of(32) if gram is None else gram), plans)

    @pytest.fixture
    def plans(self):
        return self.make().plan({f"layer_{n}": shape for n, shape in enumerate(self.shapes)})

    @pytest.fixture
    def payloads(self, weights, plans):
        return self.compressed(weights, plans)

    def test_makes_planned_levels_of_every_layer(self, weights, plans, payloads) -> None:
        assert set(payloads) == set(weights) == set(plans)
        for name in weights:
            planned = [plan.name for plan in plans[name]]
            assert list(payloads[name]) == [level for level in planned if self.offers(name, level, payloads)]
            assert planned[0] in payloads[name]

    def offers(self, unit: str, level: str, payloads) -> bool:
        """Whether a planned level must have been made."""
        return True

    def test_the_error_it_reports_is_that_of_its_weight(self, weights, payloads) -> None:
        gram = gram_of(32)
        for name, weight in weights.items():
            for payload in payloads[name].values():
                measured = layer_error(weight - payload.weight, gram)
                reported = payload.output_error(weight, gram)
                assert reported == pytest.approx(measured, rel=2e-3, abs=1e-5 * layer_error(weight, gram))

    def test_costs_rise(self, plans) -> None:
        for ladder in plans.values():
            costs = [plan.cost for plan in ladder]
            assert len(costs) > 1 and costs == sorted(set(costs)) and all(isinstance(cost, int) for cost in costs)

    def test_the_planned_cost_is_what_the_payload_takes(self, plans, payloads) -> None:
        for name, ladder in plans.items():
            for plan in ladder:
                if plan.name not in payloads[name]:
                    continue
                tensors = payloads[name][plan.name].flat()
                assert sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values()) == plan.cost

    def test_what_is_stored_decodes_to_what_was_made(self, payloads) -> None:
        for levels in payloads.values():
            for payload in levels.values():
                layout = Layout.from_json(json.loads(json.dumps(payload.layout().to_json())))
                assert sorted(layout.paths()) == sorted(payload.flat())
                rebuilt = layout.assemble({name: tensor.clone() for name, tensor in payload.flat().items()})
                assert torch.equal(rebuilt.weight, payload.weight)

    def test_the_layer_function_multiplies_with_the_weight(self, payloads) -> None:
        inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
        for payload in payloads["layer_0"].values():
            assert torch.allclose(payload.function(inputs), inputs @ payload.weight.T, atol=1e-5)

    def test_only_declared_statistics_are_read(self, weights, plans) -> None:
        compressor = self.make()
        assert isinstance(compressor.needs, frozenset)
        declared = self.measured(compressor, gram_of(32))
        assert set(declared.values) == compressor.needs
        compressor.compress(weights, declared, plans)
        for name in compressor.needs:
            with pytest.raises(StoreError, match=f"statistic '{name}'"):
                compressor.compress(weights, declared.only(compressor.needs - {name}), plans)

    def test_levels_are_numbered_and_removed_shares_are_shares(self, plans) -> None:
        for levels in plans.values():
            for level in levels:
                assert level.nominal.kind and isinstance(level.nominal.number, float)
                assert 0 <= level.removed < 1

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
        for name, levels in self.compressed(weights, plans, gram).items():
            whole = layer_error(weights[name], gram)
            for payload in levels.values():
                assert torch.isfinite(payload.weight).all()
                measured = layer_error(weights[name] - payload.weight, gram)
                assert payload.output_error(weights[name], gram) == pytest.approx(measured, rel=2e-3, abs=1e-5 * whole)

    def test_layers_do_not_influence_each_other(self, weights, plans, payloads) -> None:
        alone = self.compressed({"layer_1": weights["layer_1"]}, plans)["layer_1"]
        for level, payload in alone.items():
            assert torch.equal(payload.weight, payloads["layer_1"][level].weight)

    def test_weights_are_left_as_they_were(self, weights, plans) -> None:
        before = {name: weight.clone() for name, weight in weights.items()}
        self.compressed(weights, plans)
        assert all(torch.equal(before[name], weights[name]) for name in weights)

    def test_settings_are_part_of_the_address(self) -> None:
        digest(identity(self.make()))  # JSON-able
