"""Groups of columns that fit each layer's own width."""

import pytest
import torch

from evosweep.compressors.adaquant import AdaQuant
from evosweep.compressors.floating import FloatingPoint
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.groups import check_group, group_of
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.sparse_gptq import SparseGPTQ
from evosweep.compressors.ternary import Ternary
from evosweep.compressors.vector import VectorGrids
from evosweep.core.errors import SettingError
from evosweep.testing.compressor import gram_of, made_by

WIDTHS = {"wide": 128, "middle": 96, "odd": 100}
MAKERS = {
    "gptq": lambda group: GPTQ(bits=[2, 4], group=group),
    "gptq by activation": lambda group: GPTQ(bits=[3], group=group, order="activation", grid="mse"),
    "adaquant": lambda group: AdaQuant(bits=[3], group=group, sweeps=1),
    "rtn": lambda group: RoundToNearest(bits=[2, 4], group=group, symmetric=True),
    "floating": lambda group: FloatingPoint(formats=["e2m1"], group=group, scales="m1"),
    "vector": lambda group: VectorGrids(points=[16, 64], group=group, rotate="none"),
    "sparse_gptq": lambda group: SparseGPTQ(sparsity=[0.5], bits=[4], group=group),
    "ternary": lambda group: Ternary(groups=[group]),
}


@pytest.mark.parametrize(
    ("columns", "size"),
    [(4096, 128), (192, 64), (96, 32), (11008, 128), (100, 100), (1000, 125), (2736, 114), (1021, 1021), (20, 20)],
)
def test_auto_is_the_largest_size_that_fits(columns: int, size: int) -> None:
    assert group_of("auto", columns) == size
    assert columns % size == 0


def test_a_list_is_tried_in_its_order() -> None:
    assert [group_of([64, 96, 32], columns) for columns in (192, 96, 160)] == [64, 96, 32]
    assert group_of(None, 96) == 96 and group_of(48, 96) == 48
    assert group_of("auto", 100, within=128) == 4
    assert group_of("auto", 126, multiple=2) == 126


@pytest.mark.parametrize("kind", MAKERS)
def test_each_layer_is_coded_in_groups_of_its_own(kind: str) -> None:
    draws = torch.Generator().manual_seed(0)
    for name, columns in WIDTHS.items():
        weights = {name: torch.randn(16, columns, generator=draws)}
        size = 4 if kind == "sparse_gptq" and name == "odd" else group_of("auto", columns)
        automatic = made_by(MAKERS[kind]("auto"), weights, gram_of(columns))[name]
        fixed = made_by(MAKERS[kind](size), weights, gram_of(columns))[name]
        plan = MAKERS[kind]("auto").plan({name: (16, columns)})[name]
        for level, payload, other in zip(plan, automatic.values(), fixed.values(), strict=True):
            assert torch.equal(payload.weight, other.weight)
            stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in payload.tensors.values())
            assert stored == level.cost
            assert level.cost == MAKERS[kind](size).plan({name: (16, columns)})[name][plan.index(level)].cost


def test_one_narrow_layer_refuses_no_other() -> None:
    shapes = {"wide": (64, 256), "narrow": (64, 24)}
    with pytest.raises(SettingError, match=r"group must be null or a divisor .* auto gives each layer a size"):
        GPTQ(group=64).plan(shapes)
    costs = {name: levels[0].cost for name, levels in GPTQ(bits=[4], group="auto").plan(shapes).items()}
    assert costs == {"wide": 64 * (256 * 4 + 2 * (16 + 4)), "narrow": 64 * (24 * 4 + 16 + 4)}
    with pytest.raises(SettingError, match=r"group must be sizes of which one divides 24 \(narrow\), got \[64, 32\]"):
        GPTQ(group=[64, 32]).plan(shapes)


@pytest.mark.parametrize("group", ["large", 0, [], [64, 64], [64, "auto"], 1.5, [0]])
def test_bad_groups(group: object) -> None:
    with pytest.raises(SettingError, match=r"^group"):
        check_group("group", group)


def test_ternary_levels_of_one_size_are_one() -> None:
    plan = Ternary(groups=["row", 64, "auto"]).plan({"same": (16, 192), "other": (16, 256)})
    assert [level.name for level in plan["same"]] == ["ternary_row", "ternary_64"]
    assert [level.name for level in plan["other"]] == ["ternary_row", "ternary_auto", "ternary_64"]
