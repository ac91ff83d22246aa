import numpy as np
import pytest
import torch

from evosweep.compressors.compensate import factorize
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.lut import LookupTables, best_tables, mapped, weighted_means
from evosweep.compressors.several import Several
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by


class TestRows(CompressorContract):
    def make(self) -> LookupTables:
        return LookupTables(bits=[1, 2, 4], rounds=2, column_block=8)


class TestLayers(CompressorContract):
    def make(self) -> LookupTables:
        return LookupTables(bits=[2, 3, 5], table="layer")


class TestBesideIntegers(CompressorContract):
    def make(self) -> Several:
        parts = {"table": LookupTables(bits=[1, 2]), "plain": GPTQ(bits=[6, 8], group=16)}
        return Several(parts=parts, dominated=True)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def lookup_float64(weight, gram, tables, *, damping: float):
    """Round column by column to each row's nearest table value, in float64 (GPTQ's Algorithm 1)."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy()
    upper = np.linalg.cholesky(np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))).T
    codes = np.zeros(weight.shape, dtype=int)
    for column in range(weight.shape[1]):
        codes[:, column] = np.abs(weight[:, column, None] - tables).argmin(axis=1)
        value = tables[np.arange(len(weight)), codes[:, column]]
        weight[:, column + 1 :] -= np.outer(
            (weight[:, column] - value) / upper[column, column], upper[column, column + 1 :]
        )
        weight[:, column] = value
    return codes, weight


def test_it_equals_a_float64_reference() -> None:
    weight, gram = normal(48, 64), gram_of(64)
    payload = made_by(LookupTables(bits=[3], rounds=0), {"a": weight}, gram)["a"]["3bit_table"]
    tables = payload.tensors["tables"].double().numpy()
    codes, made = lookup_float64(weight, gram, tables, damping=0.01)
    own = np.abs(payload.weight.double().numpy()[:, :, None] - tables[:, None]).argmin(axis=2)
    assert (own == codes).mean() >= 0.99
    difference = weight.numpy() - made
    assert payload.error == pytest.approx(float(((difference @ gram.numpy()) * difference).sum()), rel=0.01)


def test_tables_solve_the_least_squares_problem_of_their_codes() -> None:
    weight, gram = normal(6, 64), gram_of(64)
    factor = factorize(gram, damping=0.01)
    ones, none = torch.ones(6), torch.zeros(64, dtype=torch.bool)
    means = weighted_means(weight, ones[:, None].expand(6, 64), 4)
    (found,) = mapped([weight], factor, [means], [ones], dead=none, column_block=8)
    tables = best_tables(weight, gram, found, shared=False)
    root = np.linalg.cholesky(gram.double().numpy()).T
    for row in range(6):
        chosen = np.eye(4)[found.codes[row].numpy()]
        expected = np.linalg.lstsq(root @ chosen, root @ weight[row].double().numpy(), rcond=None)[0]
        assert np.abs(tables[row].numpy() - expected).max() < 5e-3
    fitted = found.with_tables(tables, weight, gram)
    difference = weight - tables.gather(1, found.codes.long())
    assert float(fitted.errors.sum()) == pytest.approx(float(((difference @ gram) * difference).sum()), rel=1e-3)
    assert bool((fitted.errors <= found.errors).all())


def test_means_are_those_of_weighted_clusters() -> None:
    values, importance = normal(3, 400), torch.rand(3, 400, generator=torch.Generator().manual_seed(1))
    means = weighted_means(values, importance, 4)
    nearest = (values[:, :, None] - means[:, None]).abs().argmin(dim=2)
    for row in range(3):
        for index in range(4):
            own = nearest[row] == index
            centre = (values[row] * importance[row])[own].sum() / importance[row][own].sum()
            assert float(means[row, index]) == pytest.approx(float(centre), abs=0.03)


@pytest.mark.parametrize("table", ["row", "layer"])
def test_joint_learning_lowers_the_output_error(table: str) -> None:
    weight = normal(48, 64) ** 3  # a few large values: k-means of a layer is far from what its outputs ask for
    gram = gram_of(64, mixing=1.5)
    errors = [
        made_by(LookupTables(bits=[2], rounds=rounds, table=table), {"a": weight}, gram)["a"]["2bit_table"].error
        for rounds in (0, 1, 4)
    ]
    assert errors[0] > errors[1] >= errors[2]
    assert errors[2] < 0.95 * errors[0]


def test_tables_are_counted() -> None:
    (by_row,) = LookupTables(bits=[4]).plan({"a": (576, 576)})["a"]
    (shared,) = LookupTables(bits=[4], table="layer").plan({"a": (576, 576)})["a"]
    assert by_row.cost == 576 * 576 * 4 + 576 * 16 * 16
    assert shared.cost == 576 * 576 * 4 + 576 * 16 + 16 * 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": [0]}, "from 1 to 6"),
        ({"bits": [3, 2]}, "rising"),
        ({"bits": []}, "rising"),
        ({"table": "rows"}, "did you mean 'row'"),
        ({"rounds": -1}, "rounds"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LookupTables(**settings)
