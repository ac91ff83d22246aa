"""vLLM itself loads mixed exports, and gives the log-probabilities that were scored."""

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evosweep.compressors.base import Compressor
from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.events import Silent
from evosweep.core.problem import Genome
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.fusion import FUSED
from evosweep.models.load import LoadedModel, Random
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units
from evosweep.testing.tiny import tiny_config, tiny_splits
from tests.engines.environment import engine_python, run_engine

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}
HEAD = GPTQ(bits=[5], group=32, symmetric=True)
CASES: dict[str, tuple[Compressor, Drop, Compressor | None]] = {
    "symmetric, the head too": (GPTQ(bits=WIDTHS, group=32, symmetric=True), Drop(), HEAD),
    "asymmetric, a block dropped": (GPTQ(bits=WIDTHS, group=32), Drop(granularity="blocks"), None),
    "stock": (GPTQ(bits=[4], group=32, symmetric=True), Drop(), None),
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    engine_python("vllm")
    return Random(name="tiny", config=lambda: tiny_config(**SIZES), spread=0.15, device="cpu").load(progress=Silent())


@pytest.fixture(scope="module")
def compared(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What vLLM gives and what was scored, log-probabilities of shape (windows, tokens - 1), for each case."""
    anatomy = Anatomy(loaded.model)
    splits = tiny_splits(loaded)
    tokens = splits["search"].windows[:2]
    folder = tmp_path_factory.mktemp("vllm")
    scored = {}
    for name, (compressor, drop, head) in CASES.items():
        units = Units(tie="fused", head=head)
        logits = exported(anatomy, splits, loaded, compressor, drop, units, folder / path_of(name))
        scored[name] = np.stack([of_next(logits(torch.from_numpy(row)[None]), row) for row in tokens])
    (folder / "prompts.json").write_text(json.dumps(tokens.tolist()))
    folders = [f"{'stock:' if name == 'stock' else ''}{folder / path_of(name)}" for name in CASES]
    found = run_engine("vllm", "vllm_logits", folder / "prompts.json", *folders)
    return {name: (np.array(rows), scored[name]) for name, rows in zip(CASES, found, strict=True)}


def path_of(case: str) -> str:
    return case.partition(",")[0]


def exported(
    anatomy: Anatomy,
    splits: dict,
    loaded: LoadedModel,
    compressor: Compressor,
    drop: Drop,
    units: Units,
    folder: Path,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Writes an allocation with every level in it; returns what gives its logits."""
    store = StoreBuilder().open(plan_store(anatomy, compressor, drop, units), splits["calibration"], model_name="tiny")
    tied = units.tied(store.units, anatomy)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits, units=tied)
    problem = Budget(bits_per_weight=9).problem(tied, fixed_bits=store.fixed_bits)
    genome: Genome = np.array([index % len(unit.levels) for index, unit in enumerate(tied)])
    gates = np.array([bool(unit.gates) for unit in tied])
    genome[gates] = [unit.block != 1 for unit in tied if unit.gates]
    exporter = CompressedTensors(check_tokens=16)
    exporter.check(compressor, drop, anatomy, units)
    exporter.check_problem(problem, anatomy)
    exporter.export(genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=folder)
    return lambda ids: evaluator.logits(genome, ids)


def of_next(logits: torch.Tensor, row: np.ndarray) -> np.ndarray:
    """Returns the log-probability of each token behind the first."""
    return logits[:-1].log_softmax(-1).gather(1, torch.from_numpy(row)[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("case", [case for case in CASES if case != "stock"])
def test_vllm_gives_what_was_scored(compared, case: str) -> None:
    found, scored = compared[case]
    assert np.abs(found - scored).max() < 1e-4
    assert scored.std() > 0.5  # the model tells tokens apart


def test_its_own_kernel_runs_four_bits(compared) -> None:
    """In float16."""
    found, scored = compared["stock"]
    assert np.abs(found - scored).mean() < 0.01


def test_dropped_blocks_are_gone(compared) -> None:
    assert not np.allclose(
        compared["symmetric, the head too"][0], compared["asymmetric, a block dropped"][0], atol=0.05
    )


def test_layers_that_vllm_fuses_are_known() -> None:
    """Those of two model files or more, in vLLM's own source."""
    models = next(engine_python("vllm").parents[1].glob("lib/python*/site-packages/vllm/model_executor/models"))
    texts = [text for path in models.glob("*.py") if "packed_modules_mapping" in (text := path.read_text())]
    found = Counter(names for text in texts for names in set(fused_names(text)))
    assert len(found) > 8 and found["q_proj", "k_proj", "v_proj"] > 50
    known = [set(names) for names in FUSED]
    assert [names for names, count in found.items() if count > 1 and not any(set(names) <= own for own in known)] == []


def fused_names(text: str) -> Iterator[tuple[str, ...]]:
    """Yields the last parts of the names in every list of two or more in a ``packed_modules_mapping``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and "packed_modules_mapping" in ast.unparse(node.targets[0]):
            for part in ast.walk(node.value):
                if isinstance(part, ast.List) and len(part.elts) > 1:
                    yield tuple(ast.literal_eval(name).rpartition(".")[2] for name in part.elts)
