"""Requirements of a compressor."""

import json

import pytest
import torch

from evosweep.compressors.base import Compressor, LevelSpec, Plans, Statistics, identity, layer_error
from evosweep.compressors.payload import Layout, Payload
from evosweep.compressors.statistics import SECOND_MOMENT, SECOND_MOMENT_DIAGONAL
from evosweep.core.errors import StoreError
from evosweep.core.files import digest

Payloads = dict[str, dict[str, Payload]]


def gram_of(columns: int, *, tokens: int = 512, seed: int = 0, mixing: float = 0.5) -> torch.Tensor:
    """Return the second moment of inputs with a few strong directions, as activations have.

    Args:
        columns: Width of the input.
        tokens: Number of inputs.
        seed: Of the random numbers.
        mixing: Strength of the correlations between columns; 0: none.
    """
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=draws) @ (
        torch.eye(columns) + mixing * torch.randn(columns, columns, generator=draws) / columns**0.5
    )
    return inputs.T @ inputs / tokens


def statistics_of(gram: torch.Tensor) -> Statistics:
    """Return all statistics that follow from a second moment."""
    return Statistics({SECOND_MOMENT: gram, SECOND_MOMENT_DIAGONAL: gram.diagonal()})


def made_by(compressor: Compressor, weights: dict[str, torch.Tensor], gram: torch.Tensor) -> Payloads:
    """Return unit -> level name -> payload of every level that a compressor plans for some weights.

    Args:
        compressor: Makes the levels.
        weights: fp32, by unit name.
        gram: Second moment of their input.
    """
    plans = compressor.plan({name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()})
    return compressor.compress(weights, statistics_of(gram).only(compressor.needs), plans)


class CompressorContract:
    """Test suite of compressors; subclass it and implement ``make``.

    Implement ``measured`` too where a compressor needs more than the second moment.

    Attributes:
        shapes: Shapes (out, in) of the layers that are compressed.
    """

    shapes = ((24, 32), (8, 32))

    def make(self) -> Compressor:
        """Return the compressor, with at least two levels."""
        raise NotImplementedError

    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        """Return random weights by unit name."""
        draws = torch.Generator().manual_seed(1)
        return {f"layer_{n}": torch.randn(shape, generator=draws) for n, shape in enumerate(self.shapes)}

    def measured(self, compressor: Compressor, gram: torch.Tensor) -> Statistics:
        """Return what ``compressor`` needs, and nothing else, of an input with this second moment.

        Args:
            compressor: Declares its ``needs``.
            gram: Shape (in, in).
        """
        return statistics_of(gram).only(compressor.needs)

    def compressed(self, weights: dict[str, torch.Tensor], plans: Plans, gram: torch.Tensor | None = None) -> Payloads:
        """Return unit -> level name -> payload.

        Args:
            weights: fp32, by unit name.
            plans: What the compressor planned.
            gram: Second moment of the input; None: a random one.
        """
        compressor = self.make()
        return compressor.compress(weights, self.measured(compressor, gram_of(32) if gram is None else gram), plans)

    @pytest.fixture
    def plans(self) -> Plans:
        """Return what the compressor plans for the weights."""
        return self.make().plan({f"layer_{n}": shape for n, shape in enumerate(self.shapes)})

    @pytest.fixture
    def payloads(self, weights: dict[str, torch.Tensor], plans: Plans) -> Payloads:
        """Return all levels of the weights."""
        return self.compressed(weights, plans)

    def test_makes_planned_levels_of_every_layer(
        self, weights: dict[str, torch.Tensor], plans: Plans, payloads: Payloads
    ) -> None:
        """The cheapest level is always made."""
        assert set(payloads) == set(weights) == set(plans)
        for name in weights:
            planned = [plan.name for plan in plans[name]]
            assert list(payloads[name]) == [level for level in planned if self.offers(name, level, payloads)]
            assert planned[0] in payloads[name]

    def offers(self, unit: str, level: str, payloads: Payloads) -> bool:
        """Return whether a planned level must have been made.

        Args:
            unit: Name of the unit.
            level: Name of the level.
            payloads: What was made.
        """
        del unit, level, payloads
        return True

    def reference(self, weight: torch.Tensor, gram: torch.Tensor, level: LevelSpec) -> torch.Tensor | None:
        """Return the weight of a level by a straightforward version in float64, shape (out, in); None without one.

        Args:
            weight: Dense, shape (out, in).
            gram: Second moment of its input.
            level: As planned.
        """
        del weight, gram, level
        return None

    def test_weights_are_those_of_the_float64_reference(
        self, weights: dict[str, torch.Tensor], plans: Plans, payloads: Payloads
    ) -> None:
        """At least 99 % of a level's weights are the reference's, and the output error is within 1 % of its own."""
        gram = gram_of(32)
        for name, weight in weights.items():
            for level in plans[name]:
                expected = self.reference(weight.double(), gram.double(), level)
                if expected is None or level.name not in payloads[name]:
                    continue
                made = payloads[name][level.name].weight.double()
                same = torch.isclose(made, expected, rtol=1e-3, atol=1e-5)
                assert float(same.float().mean()) >= 0.99
                error = layer_error(weight.double() - expected, gram.double())
                assert layer_error(weight.double() - made, gram.double()) == pytest.approx(error, rel=0.01)

    def test_the_error_it_reports_is_that_of_its_weight(
        self, weights: dict[str, torch.Tensor], payloads: Payloads
    ) -> None:
        """The reported output error is ‖(W - W')X‖² under the second moment."""
        gram = gram_of(32)
        for name, weight in weights.items():
            for payload in payloads[name].values():
                measured = layer_error(weight - payload.weight, gram)
                reported = payload.output_error(weight, gram)
                assert reported == pytest.approx(measured, rel=2e-3, abs=1e-5 * layer_error(weight, gram))

    def test_costs_rise(self, plans: Plans) -> None:
        """Plans are in the order of their cost, which is in bits, exact, and never the same twice."""
        for ladder in plans.values():
            costs = [plan.cost for plan in ladder]
            assert len(costs) > 1 and costs == sorted(set(costs)) and all(isinstance(cost, int) for cost in costs)

    def test_the_planned_cost_is_what_the_payload_takes(self, plans: Plans, payloads: Payloads) -> None:
        """Budgets are met on disk: a plan's cost is the size of the stored tensors."""
        for name, ladder in plans.items():
            for plan in ladder:
                if plan.name not in payloads[name]:
                    continue
                tensors = payloads[name][plan.name].flat()
                assert sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values()) == plan.cost

    def test_what_is_stored_decodes_to_what_was_made(self, payloads: Payloads) -> None:
        """A payload is read back from tensors and JSON alone."""
        for levels in payloads.values():
            for payload in levels.values():
                layout = Layout.from_json(json.loads(json.dumps(payload.layout().to_json())))
                assert sorted(layout.paths()) == sorted(payload.flat())
                rebuilt = layout.assemble({name: tensor.clone() for name, tensor in payload.flat().items()})
                assert torch.equal(rebuilt.weight, payload.weight)

    def test_the_layer_function_multiplies_with_the_weight(self, payloads: Payloads) -> None:
        """A payload computes x W'ᵀ."""
        inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
        for payload in payloads["layer_0"].values():
            assert torch.allclose(payload.function(inputs), inputs @ payload.weight.T, atol=1e-5)

    def test_only_declared_statistics_are_read(self, weights: dict[str, torch.Tensor], plans: Plans) -> None:
        """Only what is in ``needs`` is measured."""
        compressor = self.make()
        assert isinstance(compressor.needs, frozenset)
        declared = self.measured(compressor, gram_of(32))
        assert set(declared.values) == compressor.needs
        compressor.compress(weights, declared, plans)
        for name in compressor.needs:
            with pytest.raises(StoreError, match=f"statistic '{name}'"):
                compressor.compress(weights, declared.only(compressor.needs - {name}), plans)

    def test_levels_are_numbered_and_removed_shares_are_shares(self, plans: Plans) -> None:
        """Charts and rules of propagation read these numbers."""
        for levels in plans.values():
            for level in levels:
                assert level.nominal.kind and isinstance(level.nominal.number, float)
                assert 0 <= level.removed < 1

    def test_errors_fall_as_cost_rises(self, weights: dict[str, torch.Tensor], payloads: Payloads) -> None:
        """A dearer level is a better one."""
        gram = gram_of(32)
        for name, weight in weights.items():
            errors = []
            for payload in payloads[name].values():
                difference = weight - payload.weight
                errors.append(layer_error(difference, gram))
            assert errors == sorted(errors, reverse=True)

    def test_inputs_that_are_always_zero_do_no_harm(self, weights: dict[str, torch.Tensor], plans: Plans) -> None:
        """Dead inputs make the second moment singular."""
        gram = gram_of(32)
        gram[5] = 0
        gram[:, 5] = 0
        for name, levels in self.compressed(weights, plans, gram).items():
            whole = layer_error(weights[name], gram)
            for payload in levels.values():
                assert torch.isfinite(payload.weight).all()
                measured = layer_error(weights[name] - payload.weight, gram)
                assert payload.output_error(weights[name], gram) == pytest.approx(measured, rel=2e-3, abs=1e-5 * whole)

    def test_layers_do_not_influence_each_other(
        self, weights: dict[str, torch.Tensor], plans: Plans, payloads: Payloads
    ) -> None:
        """A layer's levels are the same, whichever layers are compressed with it."""
        alone = self.compressed({"layer_1": weights["layer_1"]}, plans)["layer_1"]
        for level, payload in alone.items():
            assert torch.equal(payload.weight, payloads["layer_1"][level].weight)

    def test_weights_are_left_as_they_were(self, weights: dict[str, torch.Tensor], plans: Plans) -> None:
        """Weights are not changed in place."""
        before = {name: weight.clone() for name, weight in weights.items()}
        self.compressed(weights, plans)
        assert all(torch.equal(before[name], weights[name]) for name in weights)

    def test_settings_are_part_of_the_address(self) -> None:
        """Two compressors with other settings have other stores."""
        digest(identity(self.make()))  # JSON-able
