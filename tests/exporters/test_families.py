"""Any decoder: a mix of widths and dropped parts, scored, exported, reloaded."""

import numpy as np
import pytest

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.sparsegpt import SparseGPT
from evosweep.core.budget import Budget
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.packed import TENSORS, PackedSafetensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop, droppables
from evosweep.models.load import LoadedModel
from evosweep.search.moves import random_feasible
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import NoTokenizer, splits


def norms_of_empty_blocks(anatomy: Anatomy, store, genome) -> int:
    """Bytes that are counted with what no unit holds, and go with a block that has lost attention and MLP."""
    dropped = [effect.blocks[0] for index, effect in store.drops.items() if genome[index] == 0]
    inside = {id(p) for option in droppables(anatomy, "sublayers") for p in option.parameters}
    norms = (p for block in set(dropped) if dropped.count(block) == 2 for p in anatomy.blocks[block].parameters())
    return sum(p.numel() * p.element_size() for p in norms if id(p) not in inside)


@pytest.mark.parametrize("compressor", [GPTQ(bits=[2, 4], group=16), SparseGPT(mask_block=16)], ids=["gptq", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_scored_is_what_reloads(family: str, compressor, tmp_path) -> None:
    anatomy, texts = Anatomy(small(family, **FAMILIES[family])), splits()
    store = StoreBuilder().open(
        plan_store(anatomy, compressor, Drop(granularity="sublayers", keep=[0])),
        texts["calibration"],
        model_name=family,
    )
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=texts)
    problem = Budget(bits_per_weight=6).problem(store.units, fixed_bits=store.fixed_bits)
    genome = random_feasible(problem, np.random.default_rng(0))
    genome[next(iter(store.drops))] = 0
    for exporter in (DenseSafetensors(), PackedSafetensors()):
        facts = exporter.export(
            genome,
            problem=problem,
            evaluator=evaluator,
            folder=tmp_path / type(exporter).__name__,
            loaded=LoadedModel(family, anatomy.model, NoTokenizer()),
        )
        assert facts["max_logit_difference"] < 1e-5
    counted = 1e6 * problem.megabytes(problem.cost(genome)) - norms_of_empty_blocks(anatomy, store, genome)
    file = tmp_path / "PackedSafetensors" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(counted, abs=1)
