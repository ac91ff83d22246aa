"""GGUF files, read by transformers and by llama.cpp itself."""

import gguf
import numpy as np
import pytest
import torch

from evosweep.compressors.ggml_types import GgmlTypes
from evosweep.exporters.base import Winner
from evosweep.exporters.gguf_file import GgufFile
from evosweep.testing import ExporterContract
from tests.engines.environment import run_engine


class TestGguf(ExporterContract):
    def make(self) -> GgufFile:
        return GgufFile(check_tokens=16)

    def compressor(self) -> GgmlTypes:
        return GgmlTypes(types=["Q4_0", "Q5_0", "Q8_0"])

    @pytest.mark.usefixtures("exported")
    def test_its_size_is_known_beforehand(self, genome, evaluator, problem, tmp_path) -> None:
        winner = Winner(genome, problem, evaluator)
        tensors = gguf.GGUFReader(tmp_path / "model" / "model.gguf").tensors
        assert sum(tensor.n_bytes for tensor in tensors) == self.make().expected_bytes(winner) == winner.packed_bytes

    def test_llama_cpp_gives_what_was_scored(self, exported, genome, evaluator, splits, tmp_path) -> None:
        tokens = splits["search"].windows[0]
        np.save(tmp_path / "tokens.npy", tokens)
        facts = run_engine(
            "llama",
            "llama_logits",
            tmp_path / "model" / "model.gguf",
            tmp_path / "tokens.npy",
            tmp_path / "logits.npy",
            "what was it",
        )
        found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
        scored = evaluator.logits(genome, torch.from_numpy(tokens[None]))
        assert (found.argmax(dim=1) == scored.argmax(dim=1)).float().mean() > 0.9
        assert divergence(scored, found) < 0.02
        assert facts["warnings"] == []


def divergence(scored: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL divergence of a model's logits from those that were scored, nats."""
    return float(
        torch.nn.functional.kl_div(
            found.log_softmax(dim=1), scored.log_softmax(dim=1), log_target=True, reduction="batchmean"
        )
    )
