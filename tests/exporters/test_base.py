import numpy as np
import pytest

from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.budget import Budget
from evosweep.core.errors import SettingError
from evosweep.exporters.base import Exporter
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from tests.models.test_anatomy import small


class EvenBits(Exporter):
    """A format without 3 bits in wide layers, for an engine that fuses layers."""

    needs_ties = True

    def refusal(self, layer, level, anatomy) -> str:
        wide = anatomy.slot(layer.name).shape[1] > 32
        return "it has even widths alone" if wide and level.nominal.number % 2 else ""


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy(small("llama"))


def problem(anatomy: Anatomy, bits: list[int], **units):
    plan = plan_store(anatomy, RoundToNearest(bits=bits, group=16))
    return Budget(as_uniform=bits[0]).problem(Units(**units).tied(plan.units, anatomy))


def test_a_level_that_a_format_lacks_is_named_with_the_nearest_that_fits(anatomy) -> None:
    with pytest.raises(
        SettingError,
        match=r"EvenBits must be of a format that holds it: it has even widths alone; "
        r"the nearest that fits is 2bit, got '3bit of model\.layers\.0\.mlp\.down_proj'",
    ):
        EvenBits().check_problem(problem(anatomy, [2, 3, 8], tie="fused"), anatomy)
    EvenBits().check_problem(problem(anatomy, [2, 4], tie="fused"), anatomy)


def test_ties_that_an_engine_needs_are_named(anatomy) -> None:
    with pytest.raises(SettingError, match=r"'q_proj, k_proj, v_proj of block 0 with a level each'; units\.tie=fused"):
        EvenBits().check_problem(problem(anatomy, [2, 4]), anatomy)
    with pytest.raises(SettingError, match=r"'gate_proj, up_proj of block 0 with a level each'"):
        EvenBits().check_problem(problem(anatomy, [2, 4], tie=["self_attn.[qkv]_proj"]), anatomy)
    EvenBits().check_problem(problem(anatomy, [4]), anatomy)  # nothing to choose
    PackedSafetensors().check_problem(problem(anatomy, [2, 3, 4]), anatomy)


def test_a_finished_mixture_is_told_what_its_ties_take(anatomy) -> None:
    untied = problem(anatomy, [2, 4])
    genome = np.zeros(len(untied.units), dtype=np.int64)
    EvenBits().check_problem(untied, anatomy, genome)
    genome[0] = 1  # q_proj in 4 bits: k_proj and v_proj take 2 bits a weight more, and 2 a group's zero
    more = sum(unit.levels[1].cost - unit.levels[0].cost for unit in untied.units[1:3]) / 8e6
    with pytest.raises(SettingError, match=rf"units\.tie=fused \(this allocation grows by {more:.3g} MB if each set"):
        EvenBits().check_problem(untied, anatomy, genome)
