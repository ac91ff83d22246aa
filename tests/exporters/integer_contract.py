"""What tests of exports of integers share: a tiny model whose layers fill whole words, and levels of all widths."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from evosweep.compressors.gptq import GPTQ
from evosweep.core.events import Silent
from evosweep.evaluate.population import Evaluator
from evosweep.models.load import LoadedModel, Random
from evosweep.testing import ExporterContract
from evosweep.testing.tiny import tiny_config
from tests.engines.environment import run_engine


def logits_of(engine: str, folder: Path, tokens: np.ndarray) -> tuple[torch.Tensor, dict]:
    """Return the logits that an engine gives for tokens (batch, seq_len), and what else its script prints."""
    np.save(folder.parent / "tokens.npy", tokens)
    facts = run_engine(engine, f"{engine}_logits", folder.parent / "tokens.npy", folder)
    return torch.from_numpy(np.load(f"{folder}.npy")), facts


def assert_scored(logits: torch.Tensor, tokens: np.ndarray, evaluator: Evaluator, genome: np.ndarray) -> None:
    """Assert that logits (batch, seq_len, vocabulary) are those that were scored, to 1e-3 of the largest."""
    for row, window in zip(logits, tokens, strict=True):
        scored = evaluator.logits(genome, torch.from_numpy(window)[None])
        assert (row - scored).abs().max() < 1e-3 * scored.abs().max()


class IntegerContract(ExporterContract):
    """The contract, with a level of every width in turn, rounded in another order than that of the columns."""

    symmetric = False
    group = 32
    widths = (2, 3, 4, 8)

    def compressor(self) -> GPTQ:
        return GPTQ(bits=list(self.widths), group=self.group, symmetric=self.symmetric, order="activation")

    @pytest.fixture(scope="class")
    def loaded(self) -> LoadedModel:
        config = partial(tiny_config, hidden_size=128, intermediate_size=256, tie_word_embeddings=self.symmetric)
        loaded = Random(name="tiny", config=config, spread=0.15, device="cpu").load(progress=Silent())
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.copy_(parameter.half())  # engines that run in fp16 keep what is not quantized
            loaded.model.model.layers[0].mlp.down_proj.weight.abs_()  # so that zeros of 0 occur
        return loaded

    @pytest.fixture
    def genome(self, problem) -> np.ndarray:
        return np.arange(len(problem.units)) % len(self.widths)

    def test_its_engine_is_named_beside_our_own_loader(self, exported, tmp_path) -> None:
        assert self.make().engine_loading in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of an exported model, without the file's header."""
    file = folder / "model.safetensors"
    with file.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    return file.stat().st_size - header - 8
