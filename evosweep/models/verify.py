"""Checks of a model on a few random tokens, before any work: it is causal, its logits are finite, and it can be run
block by block on several rows at once with the same result.
"""

from typing import Protocol

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.core.seeds import generator
from evosweep.models.head import Head

CHECK_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit


class BlockByBlock(Protocol):
    """A model that can be run block by block; anatomy.Anatomy is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def head(self) -> Head: ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor: ...

    def run_block(self, index: int, hidden: torch.Tensor) -> torch.Tensor: ...

    def finish(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor: ...


def check_tokens(model: nn.Module, device: torch.device) -> torch.Tensor:
    """Return token ids (3, CHECK_TOKENS): two random rows, and the first of them with its second half changed."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(embedding.weight.shape[0])
    rows = torch.from_numpy(generator(0, "model check").integers(vocabulary, size=(3, CHECK_TOKENS)))
    rows[2, : CHECK_TOKENS // 2] = rows[0, : CHECK_TOKENS // 2]
    half = slice(CHECK_TOKENS // 2, None)
    rows[2, half] = torch.where(rows[2, half] == rows[0, half], (rows[2, half] + 1) % vocabulary, rows[2, half])
    return rows.to(device)


@torch.no_grad()
def check_causal(model: nn.Module, device: torch.device) -> torch.Tensor:
    """Return the model's fp32 logits (3, CHECK_TOKENS, vocabulary) on ``check_tokens``.

    Raises:
        ModelError: The model does not run, gives NaN or Inf, or later tokens change the logits of earlier ones.
    """
    name = type(model).__name__
    try:
        logits: torch.Tensor = model(input_ids=check_tokens(model, device), use_cache=False).logits.float()
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(f"{name} does not run on {CHECK_TOKENS} tokens: {first_line(error)}") from error
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"the dense {name} gives logits that are NaN or infinite in {_dtype(model)}: choose another model.dtype "
            "(float32 has the widest range), or the checkpoint is damaged"
        )
    half = CHECK_TOKENS // 2
    difference = _relative(logits[2, :half], logits[0, :half])
    if difference > _tolerance(model):
        raise ModelError(
            f"{name} is no causal language model: changing a later token changes the logits of earlier ones "
            f"by {difference:.2g} of the largest"
        )
    return logits


@torch.no_grad()
def check_block_by_block(chain: BlockByBlock, expected: torch.Tensor) -> None:
    """Compare the logits of the model run block by block with those of the whole model.

    Args:
        chain: The model.
        expected: The whole model's logits on ``check_tokens``, as ``check_causal`` returns them.

    Raises:
        ModelError: They differ, or a block does not run on several rows at once.
    """
    name = type(chain.model).__name__
    tokens = check_tokens(chain.model, chain.device)
    try:
        hidden = chain.embed(tokens)
        for block in range(len(chain.blocks)):
            hidden = chain.run_block(block, hidden)
        final = chain.finish(tokens, hidden)
        logits = torch.stack([chain.head.logits(row) for row in final])
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"the blocks of {name} cannot be run one by one on several rows at once, which scoring needs: "
            f"{first_line(error)}"
        ) from error
    difference = _relative(logits, expected)
    if not difference <= _tolerance(chain.model):
        raise ModelError(
            f"{name} run block by block gives other logits than the whole model, off by {difference:.2g} of the "
            "largest: its blocks need more than hidden states, masks and positions, which is not supported"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.abs().max().clamp(min=1e-6))
    return float((values.float() - expected).abs().max()) / scale


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE[torch.bfloat16])


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
