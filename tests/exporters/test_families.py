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
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.search.moves import random_feasible
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.models.test_anatomy import FAMILIES, small
from tests.models.test_dropping import NoTokenizer, splits


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
    counted = 1e6 * problem.megabytes(problem.cost(genome))
    file = tmp_path / "PackedSafetensors" / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(counted, abs=1)
