import numpy as np
import pytest
import torch

from evosweep.compressors.formats import vector_grid
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.nearest import cell_table
from evosweep.compressors.rotation import Rotation
from evosweep.compressors.several import Several
from evosweep.compressors.vector import VectorGrids
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by

CPU = torch.device("cpu")


class TestPairs(CompressorContract):
    def make(self) -> VectorGrids:
        return VectorGrids(points=[8, 32, 256, 1024])


class TestSingleWeightsInGroups(CompressorContract):
    def make(self) -> VectorGrids:
        return VectorGrids(points=[4, 16, 256], dimension=1, group=16, rotate="both")


class TestBesideIntegers(CompressorContract):
    def make(self) -> Several:
        parts = {"vector": VectorGrids(points=[8, 256]), "plain": GPTQ(bits=[2, 8], group=16)}
        return Several(parts=parts, dominated=True)


def normal(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def vector_float64(weight, gram, *, points, scale, damping: float):
    """Round pairs of columns, every point tried, in float64; errors move on as in GPTQ's Algorithm 1."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy()
    upper = np.linalg.cholesky(np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))).T
    dimension = points.shape[1]
    codes = []
    for start in range(0, weight.shape[1], dimension):
        stop = start + dimension
        change = weight[:, None, start:stop] - points[None] * scale[:, None, None]
        errors = change @ np.linalg.inv(upper[start:stop, start:stop])
        codes.append((errors**2).sum(axis=2).argmin(axis=1))
        moved = errors[np.arange(len(weight)), codes[-1]]
        weight[:, start:stop] = points[codes[-1]] * scale[:, None]
        weight[:, stop:] -= moved @ upper[start:stop, stop:]
    return np.stack(codes, axis=1), weight


@pytest.mark.parametrize(("dimension", "points", "block"), [(2, 64, 16), (2, 1024, 5), (1, 8, 64)])
def test_it_equals_a_float64_reference(dimension: int, points: int, block: int) -> None:
    weight, gram = normal(48, 64), gram_of(64)
    compressor = VectorGrids(points=[points], dimension=dimension, column_block=block)
    (payload,) = made_by(compressor, {"a": weight}, gram)["a"].values()
    turn = Rotation.of(64, seed=0, device=CPU)
    rotated = turn.apply(weight)
    scale = rotated.square().mean(dim=1).sqrt().half().double().numpy()
    assert np.array_equal(payload.tensors["scales"][:, 0].double().numpy(), scale)
    grid = vector_grid.grid_points(dimension, points, CPU).double().numpy()
    codes, made = vector_float64(rotated, turn.conjugate(gram), points=grid, scale=scale, damping=0.01)
    found = turn.apply(payload.weight).view(48, -1, dimension) / torch.from_numpy(scale).float()[:, None, None]
    own = torch.cdist(found.reshape(-1, dimension), torch.from_numpy(grid).float()).argmin(dim=1).view(48, -1).numpy()
    assert (own == codes).mean() >= 0.99
    difference = weight - turn.undo(torch.from_numpy(made).float())
    assert payload.error == pytest.approx(float(((difference @ gram) * difference).sum()), rel=0.01)


@pytest.mark.parametrize("width", [64, 48, 7])
def test_rotations_are_orthogonal_and_can_be_undone(width: int) -> None:
    turn = Rotation.of(width, seed=1, device=CPU)
    matrix = turn.apply(torch.eye(width))
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=1e-5)
    values = normal(5, width)
    assert torch.allclose(turn.undo(turn.apply(values)), values, atol=1e-5)
    gram = gram_of(width)
    assert torch.allclose(turn.conjugate(gram), matrix.T @ gram @ matrix, atol=1e-4)
    assert not torch.equal(matrix, Rotation.of(width, seed=2, device=CPU).apply(torch.eye(width)))


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_nearest_point_is_among_the_candidates(dimension: int) -> None:
    sizes = (16, 128)
    table = cell_table(dimension, sizes, CPU)
    values = normal(400, dimension) * 1.5
    grid = torch.arange(400) % 2
    near = table.near(values, grid)
    distance = (values[:, None] - table.points[near]).norm(dim=2).amin(dim=1)
    for index, size in enumerate(sizes):
        own = values[grid == index]
        points = vector_grid.grid_points(dimension, size, CPU)
        least = (own[:, None] - points).norm(dim=2).amin(dim=1)
        assert torch.allclose(distance[grid == index], least, atol=1e-5)


def test_grids_come_near_the_rate_distortion_bound() -> None:
    sample = normal(20000, 2, seed=5)
    for points, expected in ((16, 0.1089), (64, 0.0300), (256, 0.00783), (1024, 0.00202)):
        error = torch.cdist(sample, vector_grid.grid_points(2, points, CPU)).amin(dim=1).square().mean() / 2
        assert float(error) == pytest.approx(expected, rel=0.05)
    assert vector_grid.grid_points(1, 4, CPU).flatten().tolist() == pytest.approx(
        [-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-3
    )


def test_pairs_beat_single_weights_and_groups_of_integers_at_fewer_bits() -> None:
    weight, gram = normal(64, 128), gram_of(128)
    errors = [
        next(iter(made_by(compressor, {"a": weight}, gram)["a"].values())).error
        for compressor in (VectorGrids(points=[64]), VectorGrids(points=[8], dimension=1), GPTQ(bits=[3], group=64))
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": [12]}, r"points must be a rising list of some of 4, 8, 16"),
        ({"points": [64, 16]}, "rising"),
        ({"points": []}, "rising"),
        ({"dimension": 3}, "dimension"),
        ({"group": 9}, "a multiple of the dimension, 2"),
        ({"rotate": "inputs"}, "did you mean 'input'"),
        ({"scale_factor": 0}, "scale_factor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        VectorGrids(**settings)


def test_widths_that_do_not_fit_are_named_before_any_work() -> None:
    with pytest.raises(SettingError, match=r"group must be null or a divisor .* 1 layers \(a .* 100"):
        VectorGrids(group=64).plan({"a": (10, 100)})
    with pytest.raises(SettingError, match=r"dimension .* 1 layers \(a .* 33"):
        VectorGrids().plan({"a": (10, 33)})
