"""The experiments of the command line on small models of families that people compress, from checkpoint to export."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evosweep.cli.main import CONF
from evosweep.cli.reopen import Earlier, reopen, settings_of
from evosweep.core.results import read_result
from evosweep.exporters.packed import TENSORS, load
from tests.cli import evosweep, workplace
from tests.families.__main__ import quiet
from tests.families.configs import CAUSAL, SEEING
from tests.families.trial import make_checkpoint, swapped

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "llama4_text", "granitemoe", "qwen3_next")
FAMILIES = {
    **dict.fromkeys((*MIXTURES, "jamba", "falcon_h1", "lfm2", "gemma3n_text", "gemma4_text"), CAUSAL),
    "llava": SEEING,
}
EXPERIMENTS = {
    "quant_3bit": ("compressor.bits=[2,3,4]", "compressor.group=auto"),
    "sparsity_50": (),
    "drop_25": (),
}
SMALL = [
    "model=hf",
    "model.dtype=float32",
    "model.device=cpu",
    "data=text",
    "data.path=corpus.jsonl",
    "tokens.seq_len=32",
    "tokens.calibration=256",
    "tokens.validation=128",
    "search=small",
    "search.generations=1",
    "search.offspring=4",
    "search.stages=[{survivors:1,tokens:64}]",
    "units.coverage=0",
    "tracking=none",
    "report=none",
    "storage=memory",
    "export=packed",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    quiet()
    with workplace(tmp_path_factory.mktemp("experiments")) as folder:
        yield folder


def checkpoint(place: Path, family: str) -> Path:
    if not (place / family).is_dir():
        make_checkpoint(family, place / family, loader=FAMILIES[family])
    return place / family


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.double()


def kl(dense: torch.Tensor, changed: torch.Tensor) -> float:
    """Return the mean KL of the next token's distributions, all tokens but the last of every window."""
    before = dense[:, :-1].log_softmax(-1)
    return float((before.exp() * (before - changed[:, :-1].log_softmax(-1))).sum(-1).mean())


def uncounted(run: Earlier) -> int:
    """Return the bytes of norms in blocks of which all parts are dropped: such a block is not written at all."""
    units = run.bench.store.units
    genome = run.bench.evaluator.expand(run.genome)
    found = 0
    for index, block in enumerate(run.bench.anatomy.blocks):
        drops = {unit: effect for unit, effect in run.bench.store.drops.items() if effect.blocks == (index,)}
        if drops and not any(genome[unit] for unit in drops):
            parts = sum(units[unit].numel for unit in drops)
            found += sum(value.nbytes for value in block.state_dict().values()) - 4 * parts
    return found


def check(row: dict[str, Any], run: Earlier, model: Path) -> None:
    """Compare a run's figures and its export with the real model whose weights are overwritten."""
    bench = run.bench
    tokens = torch.from_numpy(bench.splits["validation"].windows)
    dense = logits(bench.loaded.model, tokens)
    with swapped(bench, bench.evaluator.expand(run.genome)):
        expected = logits(bench.loaded.model, tokens)
    assert row["kl"] == pytest.approx(kl(dense, expected), rel=1e-4)
    assert row["kl"] > 1e-3
    reloaded = logits(load(model, dtype=torch.float32), tokens)
    assert float((reloaded - expected).abs().max() / expected.abs().max()) <= 1e-5

    file = model / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size - header + uncounted(run)
    counted = 1e6 * run.problem.megabytes(run.problem.cost(run.genome))
    streams = sum(tensor.dtype == torch.uint8 for tensor in load_file(file).values())  # each ends with a whole byte
    assert counted - 1 <= size <= counted + streams
    assert row["size_mb"] == pytest.approx(counted / 1e6, rel=1e-6)
    assert run.problem.cost(run.genome) <= run.problem.budget


def experiment(place: Path, family: str, name: str) -> tuple[dict[str, Any], Earlier, Path]:
    """Run an experiment on a family; return its row, the run opened again, and the exported folder."""
    path = checkpoint(place, family)
    label = f"{family}-{name}"
    assert evosweep(f"+experiment={name}", *SMALL, *EXPERIMENTS[name], f"model.path={path}", f"name={label}") == 0
    (result,) = (place / "runs" / label).glob("*/result.json")
    run = reopen(result.parent, settings_of(result.parent, [], CONF))
    return read_result(result), run, result.parent / "model"


@pytest.mark.families
@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_experiment_on_a_family_is_right_from_checkpoint_to_export(place: Path, family: str, name: str) -> None:
    check(*experiment(place, family, name))
