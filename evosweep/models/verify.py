"""Checks of a model on a few random tokens, before any work: it is causal, its logits are finite, and it can be run on
several rows at once with the same result, block by block or as a whole.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.core.seeds import generator
from evosweep.models.head import Head
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import RowGroups, Slot
from evosweep.models.sublayers import parameter_names

CHECK_TOKENS = 8
WINDOWS = 2  # that run at once
WHOLE_GROUPS = 4  # of blocks whose layers are tried at once, where the whole model runs
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit


class BlockByBlock(Protocol):
    """A model that can be run block by block; anatomy.Anatomy is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def whole_because(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def head(self) -> Head: ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor: ...

    def run_block(self, index: int, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output of one block.

        Args:
            index: Of the block.
            hidden: Its input (batch, seq_len, hidden).
            tokens: Token ids (windows, seq_len).
        """
        ...

    def run(self, tokens: torch.Tensor) -> torch.Tensor: ...

    def run_whole(self, tokens: torch.Tensor) -> torch.Tensor: ...

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
def why_not_block_by_block(chain: BlockByBlock, expected: torch.Tensor) -> str:
    """Return why a model cannot be run block by block on two different windows at once; nothing where it can.

    Args:
        chain: The model.
        expected: The whole model's logits on ``check_tokens``, as ``check_causal`` returns them.
    """
    tokens = check_tokens(chain.model, chain.device)[:WINDOWS]
    try:
        hidden = chain.embed(tokens)
        if hidden.shape[:2] != tokens.shape or hidden.dim() != len(("batch", "tokens", "hidden")):
            return f"hidden states have shape {tuple(hidden.shape)} for {tuple(tokens.shape)} tokens"
        alone = hidden[1:]
        for block in range(len(chain.blocks)):  # a smaller batch in between: nothing but hidden states may be passed on
            hidden = chain.run_block(block, hidden, tokens)
            alone = chain.run_block(block, alone, tokens[1:])
        final = chain.finish(tokens, hidden)
        logits = torch.stack([chain.head.logits(row) for row in final])
    except Exception as error:  # whatever a model's own code raises
        return first_line(error)
    difference = max(_relative(logits, expected[:WINDOWS]), _relative(alone, hidden[1:].float()))
    if difference <= _tolerance(chain.model):
        return ""
    return f"run one by one they give other logits, off by {difference:.2g} of the largest"


@torch.no_grad()
def why_not_on_text(chain: BlockByBlock, text: torch.Tensor | None) -> str:
    """Return why blocks that run one by one give other final hidden states on real windows; nothing where they do not.

    Args:
        chain: The model.
        text: Token ids (windows, seq_len).
    """
    if text is None:
        return ""
    tokens = text.to(chain.device)
    try:
        difference = _relative(chain.run(tokens), chain.run_whole(tokens))
    except Exception as error:  # whatever a model's own code raises
        return first_line(error)
    if difference <= _tolerance(chain.model):
        return ""
    return f"run one by one on the text they give other hidden states, off by {difference:.2g} of the largest"


@torch.no_grad()
def check_whole(chain: BlockByBlock, expected: torch.Tensor) -> None:
    """Compare the logits of two windows, one after the other through the whole model, with those of a batch.

    Args:
        chain: The model.
        expected: The whole model's logits on ``check_tokens``, as ``check_causal`` returns them.

    Raises:
        ModelError: They differ, or the model does not run.
    """
    name = type(chain.model).__name__
    tokens = check_tokens(chain.model, chain.device)[:WINDOWS]
    try:
        final = [chain.run_whole(row[None])[0] for row in tokens]
        logits = torch.stack([chain.head.logits(row) for row in final])
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(f"{name} does not run on one window: {first_line(error)}") from error
    difference = _relative(logits, expected[:WINDOWS])
    if not difference <= _tolerance(chain.model):
        raise ModelError(
            f"{name} gives a window other logits in a batch than alone, off by {difference:.2g} of the largest, so "
            "that candidates cannot be compared"
        )


@torch.no_grad()
def not_by_row(chain: BlockByBlock, slots: Sequence[Slot]) -> dict[str, str]:
    """Return the slots whose weight is not all that makes the difference between two rows of a population, and why.

    Two rows are the same window, the second with other weights in every slot. They must be what the model gives alone
    with the weights as they are, and with the other ones written into it. Block by block, or in a few groups of blocks
    where the whole model runs; single slots are tried only where a block fails.

    Args:
        chain: The model.
        slots: Slots in its blocks.
    """
    tokens = check_tokens(chain.model, chain.device)[:1]
    count = len(chain.blocks)
    step = 1 if not chain.whole_because else -(-count // WHOLE_GROUPS)
    hidden = tokens if chain.whole_because else chain.embed(tokens)
    failed: dict[str, str] = {}
    for start in range(0, count, step):
        here = [slot for slot in slots if start <= slot.block < start + step]
        run = chain.run_whole if chain.whole_because else partial(_block_of_rows, chain, start, tokens)
        dense = run(hidden)
        if _row_fault(run, hidden, dense, here):
            found = {slot.name: _row_fault(run, hidden, dense, [slot]) for slot in here}
            failed |= {name: fault for name, fault in found.items() if fault}
        hidden = hidden if chain.whole_because else dense
    return failed


def _block_of_rows(chain: BlockByBlock, block: int, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return chain.run_block(block, hidden, tokens)


def _row_fault(
    run: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, dense: torch.Tensor, slots: Sequence[Slot]
) -> str:
    """Return what is wrong with a second row that has other weights in some slots; nothing where it is right.

    Args:
        run: Runs a block on hidden states, or the model on token ids.
        given: What it is given, of one window.
        dense: What it returns then.
        slots: The slots.
    """
    groups = RowGroups([0, 1], [torch.tensor([row], device=given.device) for row in range(2)], 0, 2, cover=False)
    dense_weights = {slot.name: slot.read().to(given.device) for slot in slots}
    others = {name: weight.roll(1, dims=0) for name, weight in dense_weights.items()}
    try:
        with replaced_weights(slots, others):
            swapped = run(given)
        with ExitStack() as stack:
            for slot in slots:
                weights = {0: dense_weights[slot.name], 1: others[slot.name]}
                stack.enter_context(slot.forward_by_row(groups, weights))
            rows = run(torch.cat([given, given]))
    except Exception as error:  # whatever a model's own code raises
        return first_line(error)
    difference = max(_relative(rows[:1], dense), _relative(rows[1:], swapped))
    return "" if difference <= _tolerance_of(dense.dtype) else f"off by {difference:.2g} of the largest output"


def sharing(slots: Sequence[Slot], model: nn.Module) -> dict[str, str]:
    """Return the slots whose parameter another module has, too, and which."""
    names = parameter_names(model)
    paths = {id(module): path for path, module in model.named_modules()}
    others = {
        slot.name: [name for name in names[id(slot.parameter)] if name.rpartition(".")[0] != paths[id(slot.module)]]
        for slot in slots
    }
    return {name: f"it shares its weight with {other[0].rpartition('.')[0]}" for name, other in others.items() if other}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the next one where it ends in a colon; else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):  # whose message is the key alone
        return f"there is no {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value; in half precision that of the median token.

    In half precision a router may send single tokens elsewhere in another batch, by the rounding of its scores.
    """
    wanted = expected.float()
    by_token = (values.float() - wanted).abs().flatten(0, -2).amax(dim=-1)
    worst = by_token.max() if expected.dtype is torch.float32 else by_token.median()
    return float(worst) / float(wanted.abs().max().clamp(min=1e-6))


def _tolerance(model: nn.Module) -> float:
    return _tolerance_of(next(model.parameters()).dtype)


def _tolerance_of(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
