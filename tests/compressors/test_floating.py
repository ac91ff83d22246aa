"""Floating-point levels: formats as their specifications have them, and the column loop against a float64 version."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8

from evosweep.compressors.float_scales import FloatSpec, fit_scales, scales_of, whole_scale
from evosweep.compressors.floating import BLOCKS, FORMATS, FloatingPoint
from evosweep.compressors.formats import float_blocks
from evosweep.compressors.formats.grouped_int import unpack
from evosweep.compressors.grid_search import GridSearch
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import CompressorContract, gram_of, made_by

# OCP Microscaling Formats 1.0, section 5.3; E3M0: powers of two.
POSITIVE = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "e2m3": [n / 8 for n in range(16)] + [n / 4 for n in range(8, 16)] + [n / 2 for n in range(8, 16)],
}


@pytest.mark.parametrize("element", POSITIVE)
def test_small_formats_are_those_of_the_specification(element: str) -> None:
    table = float_blocks.table(element)
    assert table[: len(table) // 2].tolist() == POSITIVE[element]
    assert table[len(table) // 2 :].tolist() == [-value for value in POSITIVE[element]]


@pytest.mark.parametrize(("element", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_formats_are_torch_s(element: str, dtype: torch.dtype) -> None:
    table = float_blocks.table(element)
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = theirs.isfinite()
    assert torch.equal(table[finite], theirs[finite]) and table[~finite].isnan().all()
    kind = float_blocks.ELEMENTS[element]
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 4000)
    made = float_blocks.rounded(values, float_blocks.Limits.of([element], [1], values.device))
    assert torch.equal(made, values.clamp(-kind.largest, kind.largest).to(dtype).float())
    assert torch.equal(float_blocks.codes_of(made, element).view(dtype).float(), made)


@pytest.mark.parametrize("element", float_blocks.ELEMENTS)
def test_rounding_is_to_the_nearest_number_and_codes_come_back(element: str) -> None:
    kind = float_blocks.ELEMENTS[element]
    numbers = float_blocks.table(element)
    numbers = numbers[~numbers.isnan()]
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)) * kind.largest / 3
    made = float_blocks.rounded(values, float_blocks.Limits.of([element], [1], values.device))
    nearest = (values[:, None] - numbers).abs().amin(dim=1)
    assert torch.equal((values - made).abs(), nearest)
    assert torch.equal(float_blocks.table(element)[float_blocks.codes_of(made, element).long()], made)


@pytest.mark.parametrize("element", float_blocks.ELEMENTS)
def test_values_between_two_numbers_go_to_the_even_mantissa(element: str) -> None:
    numbers = float_blocks.table(element)[: 2 ** (float_blocks.ELEMENTS[element].bits - 1)]
    numbers = numbers[~numbers.isnan()]
    halves = (numbers[1:] + numbers[:-1]) / 2
    codes = torch.arange(len(halves))
    even = numbers[torch.where(codes % 2 == 0, codes, codes + 1)]
    limits = float_blocks.Limits.of([element], [1], halves.device)
    if float_blocks.ELEMENTS[element].mantissa:  # with none, the exponent's last bit decides nothing
        assert torch.equal(float_blocks.rounded(halves, limits), even)
    assert torch.equal(float_blocks.rounded(-3 * numbers[-1:], limits), -numbers[-1:])


def test_scales_next_to_powers_of_two_are_exact() -> None:
    powers = torch.tensor([2.0**-3, 2.0**5])
    ends = torch.tensor([0.0, 1e9])
    near = torch.stack([torch.nextafter(powers, ends[:1]), powers, torch.nextafter(powers, ends[1:])], dim=1).flatten()
    exponents = torch.tensor([-4, -3, -3, 4, 5, 5])
    whole = torch.ones(())
    mx = scales_of(near, BLOCKS["mxfp4"], whole=whole)
    assert torch.equal(mx, torch.exp2(exponents - 2.0))
    assert torch.equal(float_blocks.encode_scales(mx[:, None], "e8m0", whole=whole)["scales"][:, 0], exponents + 125)
    assert torch.equal(
        float_blocks.power_of_two(torch.arange(255, dtype=torch.uint8)), 2.0 ** torch.arange(-127.0, 128)
    )


def codes_by_two(payload) -> torch.Tensor:
    """Codes of four bits, two a byte, the first of them in the low half."""
    rows, columns = payload.meta["rows"], payload.meta["columns"]
    codes = unpack(payload.tensors["codes"], 4, rows * columns).view(rows, columns)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_compressed_tensors_reads_the_same_weights(name: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    payload = made_by(FloatingPoint(formats=[name]), {"a": weight}, gram_of(64))["a"][name]
    packed = codes_by_two(payload)
    numbers = unpack_fp4_from_uint8(packed, 8, 64, dtype=torch.float32)
    assert torch.equal(pack_fp4_to_uint8(numbers), packed)
    stored = payload.tensors["scales"]
    if name == "nvfp4":
        scales = stored.view(torch.float8_e4m3fn).float() / (1 / payload.tensors["whole"])
    else:
        scales = decompress_mx_scale(stored).float()
    read = numbers * scales.repeat_interleave(payload.meta["block"], dim=1)
    assert torch.allclose(read, payload.weight, rtol=1e-6 if name == "nvfp4" else 0, atol=0)


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor"])
def test_torch_reads_the_same_weights(name: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    payload = made_by(FloatingPoint(formats=[name]), {"a": weight}, gram_of(64))["a"][name]
    codes = unpack(payload.tensors["codes"], 8, weight.numel()).view(8, 64)
    assert payload.tensors["scales"].shape == ((8, 1) if name == "fp8" else (1,))
    assert torch.equal(codes.view(torch.float8_e4m3fn).float() * payload.tensors["scales"], payload.weight)


@pytest.mark.parametrize("spec", [FloatSpec("e2m1", 16, "fp16"), BLOCKS["nvfp4"], BLOCKS["mxfp4"]], ids=str)
def test_a_search_finds_the_scale_with_the_least_error(spec: FloatSpec) -> None:
    """Every scale near a block's own, tried in float64, is no better."""
    weight = torch.randn(2, spec.block or 1, 12, generator=torch.Generator().manual_seed(3))
    whole = whole_scale(weight.flatten(0, 1), spec)
    search = GridSearch.of(norm=2.4, least=0.5, steps=21)
    numbers = float_blocks.table(spec.element).double()

    def error(scales: torch.Tensor) -> torch.Tensor:
        relative = weight.double() / scales[:, None]
        nearest = numbers[(relative[..., None] - numbers).abs().argmin(-1)]
        return ((relative - nearest) * scales[:, None]).abs().pow(2.4).sum(1)

    made = error(fit_scales(weight, spec, search, whole=whole).double())
    steps = [2.0, 1.0, 0.5] if spec.scale == "e8m0" else [1.5 - 0.0375 * step for step in range(21)]
    largest = weight.abs().amax(1)
    tried = torch.stack([error(scales_of(largest * step, spec, whole=whole).double()) for step in steps])
    assert torch.allclose(made, tried.amin(0), rtol=1e-5)
    assert (made < error(fit_scales(weight, spec, None, whole=whole).double())).any()


@pytest.mark.parametrize("order", ["given", "activation"])
def test_a_search_is_kept_where_it_lowers_a_layers_error(order: str) -> None:
    weights = {"a": torch.randn(24, 64, generator=torch.Generator().manual_seed(0))}
    settings = {"formats": ["e2m1", "mxfp6", "nvfp4", "fp8"], "order": order}
    plain = made_by(FloatingPoint(**settings), weights, gram_of(64))["a"]
    searched = made_by(FloatingPoint(**settings, grid="mse"), weights, gram_of(64))["a"]
    errors = {name: (searched[name].error, plain[name].error) for name in plain}
    assert all(ours <= theirs for ours, theirs in errors.values())
    assert errors["nvfp4"][0] < 0.85 * errors["nvfp4"][1]


def float64_scales(block, spec, whole):
    """Scales of each row of a block, straight from the specifications."""
    largest = np.abs(block).max(1)
    top = float_blocks.ELEMENTS[spec.element].largest
    wanted = np.maximum(largest / top, 2.0**-24)
    if spec.scale == "e8m0" and spec.saturates:
        return 2.0 ** (np.floor(np.log2(largest)) - np.floor(np.log2(top)))
    if spec.scale == "e8m0":
        return 2.0 ** np.ceil(np.log2(wanted))
    if spec.scale == "layer":
        return np.full(len(block), whole)
    if spec.scale == "ratio":
        return whole / 2.0 ** np.clip(np.floor(np.log2(whole / wanted)), 0, 15)
    if spec.scale == "nvfp4":
        return torch.from_numpy(wanted / whole).to(torch.float8_e4m3fn).double().numpy() * whole
    return wanted.astype(np.float32 if spec.scale == "fp32" else np.float16).astype(np.float64)


def float64_weight(weight, gram, level, *, order: str, damping: float = 0.01):
    """GPTQ's Algorithm 1 on a level's numbers, one column at a time in float64, nearest by search."""
    spec = level.spec
    weight, gram = weight.numpy().copy(), gram.numpy().copy()
    numbers = float_blocks.table(spec.element).double().numpy()
    numbers = np.sort(numbers[~np.isnan(numbers)])
    block = spec.block or weight.shape[1]
    top = float_blocks.ELEMENTS[spec.element].largest
    whole = 1.0
    if spec.scale == "nvfp4":
        whole = np.float64(np.float32(np.abs(weight).max() / (448 * top)))
    if spec.scale == "layer":
        whole = np.float64(np.float32(np.abs(weight).max() / top))
    if spec.scale == "ratio":
        whole = (np.abs(weight).max(1) / top).astype(np.float16).astype(np.float64)
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))
    columns = list(range(weight.shape[1]))
    scales = {}
    if order == "activation":
        scales = {s: float64_scales(weight[:, s : s + block], spec, whole) for s in range(0, len(columns), block)}
        columns = np.argsort(-np.diag(gram), kind="stable").tolist()
    upper = np.linalg.cholesky(np.linalg.inv(gram[columns][:, columns])).T
    made = np.zeros_like(weight)
    for place, column in enumerate(columns):
        start = column // block * block
        if start not in scales:
            scales[start] = float64_scales(weight[:, start : start + block], spec, whole)
        relative = weight[:, column] / scales[start]
        made[:, column] = numbers[np.abs(relative[:, None] - numbers).argmin(1)] * scales[start]
        error = (weight[:, column] - made[:, column]) / upper[place, place]
        weight[:, columns[place + 1 :]] -= np.outer(error, upper[place, place + 1 :])
    return torch.from_numpy(made)


class Floats(CompressorContract):
    def reference(self, weight, gram, level):
        return float64_weight(weight, gram, level, order=self.make().order)


class TestFree(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["e2m1", "e3m2", "e4m3"], group=8, column_block=5)


class TestPowersOfTwo(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["e2m1", "e2m3"], group=16, scales="m1")


class TestRatios(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["e2m1", "e2m3"], group=8, scales="m2", order="activation")


class TestBlocks(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["mxfp4", "mxfp8"])


class TestEngines(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["nvfp4", "fp8"], order="activation")


class TestPowers(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["e3m0", "fp8"], group=16)


class TestLayerScale(Floats):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["mxfp6", "fp8_tensor"])


class TestSearched(CompressorContract):
    def make(self) -> FloatingPoint:
        return FloatingPoint(formats=["mxfp4", "nvfp4", "e2m3"], group=16, grid="mse", order="activation")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ["fp4"]}, "formats must be one of e2m1, .*got 'fp4'"),
        ({"formats": []}, "formats must be a list of"),
        ({"formats": ["fp8", "fp8"]}, "each format once"),
        ({"scales": "m3"}, "scales must be one of free, m1, m2"),
        ({"scales": "m2", "group": None}, "a whole row has one scale"),
        ({"group": 0}, "group must"),
        ({"grid": "max"}, "grid must be one of minmax, mse"),
        ({"grid": "mse", "grid_norm": 0.5}, "grid_norm must be"),
    ],
)
def test_settings_that_make_no_format_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        FloatingPoint(**settings)


def test_a_block_that_does_not_divide_a_width_names_the_layers_and_what_fits() -> None:
    with pytest.raises(
        SettingError,
        match=r"formats must be formats whose blocks .* divide .*: 1 layers .b .*. have 48, and what divides 16",
    ):
        FloatingPoint(formats=["mxfp4"]).plan({"a": (8, 64), "b": (8, 48)})


def test_formats_of_one_size_cannot_be_one_ladder() -> None:
    with pytest.raises(SettingError, match=r"formats of different sizes, got .*compressor=several"):
        FloatingPoint(formats=["e2m1", "e3m0"], group=8).plan({"a": (8, 32)})


def test_constraints_of_scales_are_part_of_a_levels_name() -> None:
    levels = FloatingPoint(formats=["e2m1", "fp8"], scales="m1", group=8).plan({"a": (8, 32)})["a"]
    assert [level.name for level in levels] == ["e2m1_m1", "fp8"]


def test_every_named_format_can_be_made() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for name in FORMATS:
        payload = made_by(FloatingPoint(formats=[name]), {"a": weight}, gram_of(64))["a"][name]
        assert float((payload.weight - weight).norm() / weight.norm()) < (0.5 if name in ("e3m0",) else 0.2)
    assert set(BLOCKS) < set(FORMATS)
