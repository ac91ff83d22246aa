"""A model with random weights and a text of random words, both small enough for tests."""

import numpy as np
import transformers

from evosweep.core.events import Silent
from evosweep.data.documents import Document
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.models.load import LoadedModel, Random

PHRASE = "the layer that matters most is not always the first one but it often helps to look there before others do"
WORDS = PHRASE.split()


class RandomWords:
    """A source of documents of random words: enough to count, split and tokenize.

    Args:
        count: Number of documents.
        words: Words in each.
    """

    def __init__(self, count: int = 40, words: int = 120) -> None:
        self.count = count
        self.words = words

    def documents(self, *, progress: object) -> list[Document]:
        """Return the documents, always the same."""
        del progress
        rng = np.random.default_rng(7)
        return [Document(f"doc/{n}", " ".join(rng.choice(WORDS, self.words))) for n in range(self.count)]


def tiny_config(**changes: int) -> transformers.PretrainedConfig:
    """Return the config of a Llama of two blocks, hidden size 32.

    Args:
        changes: Other values of its settings.
    """
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


def tiny_model() -> LoadedModel:
    """Return a model of ``tiny_config`` with random weights and a byte tokenizer, on the CPU."""
    return Random(name="tiny", config=tiny_config, spread=0.15, device="cpu").load(progress=Silent())


def tiny_splits(loaded: LoadedModel) -> dict[str, TokenSplit]:
    """Return calibration, search and validation windows of 32 tokens."""
    shares = {"validation": 0.2, "search": 0.3, "calibration": 0.5}
    windows = Windows(seq_len=32, calibration=1024, validation=256, shares=shares)
    return windows.split(RandomWords(), loaded.tokenizer)
