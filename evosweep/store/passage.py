"""Calibration text on its way through a model whose blocks are compressed one after the other.

Block by block, hidden states are kept between blocks. A model whose blocks cannot be run one by one runs as a whole for
every block, up to that block's last layer: the blocks before have their compressed weights, so that nothing is
approximated, and calibration takes about half as many forward passes more as there are blocks.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch

from evosweep.models.anatomy import Anatomy
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import Slot


class Passage:
    """Calibration text between two blocks; a context in which the model may hold compressed weights.

    Args:
        anatomy: The model.
        tokens: Token ids in batches, each (windows, seq_len).
        home: Where hidden states are kept.

    Attributes:
        hidden: Inputs of the next block, in batches (windows, seq_len, hidden); None where the whole model runs.
    """

    def __init__(self, anatomy: Anatomy, tokens: Sequence[torch.Tensor], home: torch.device) -> None:
        self.anatomy = anatomy
        self.tokens = list(tokens)
        self.home = home
        self.hidden: list[torch.Tensor] | None = None
        self._replaced = ExitStack()

    def __enter__(self) -> "Passage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replaced.__exit__(kind, error, trace)

    def begin(self, embedding: AbstractContextManager[None]) -> None:
        """Go to the first block.

        Args:
            embedding: A context in which the embedding has the weights that the text goes through.
        """
        if self.anatomy.whole_because:
            self._replaced.enter_context(embedding)
            return
        with embedding:
            self.hidden = [self.anatomy.embed(batch).to(self.home) for batch in self.tokens]

    def pass_on(self, block: int, slots: Sequence[Slot], weights: Mapping[str, torch.Tensor]) -> None:
        """Go behind a block.

        Args:
            block: Its index.
            slots: Its compressed layers.
            weights: Their weights that the text goes through.
        """
        if self.hidden is None:
            self._replaced.enter_context(replaced_weights(slots, weights))
            return
        with replaced_weights(slots, weights):
            for index, tokens in enumerate(self.tokens):
                batch = self.hidden[index]
                self.hidden[index] = self.anatomy.run_block(block, batch, tokens).to(batch.device)

    def final(self, index: int) -> torch.Tensor:
        """Return the final hidden states (windows, seq_len, hidden) of a batch, behind the last block."""
        tokens = self.tokens[index]
        if self.hidden is None:
            return self.anatomy.run_whole(tokens)
        return self.anatomy.finish(tokens, self.hidden[index].to(self.anatomy.device))
