"""Each block of a model on the inputs that the model gives it, run as often as is asked, on a few random tokens."""

import copy
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from evosweep.core.seeds import generator
from evosweep.models.patch import replaced_forward

PROBE = (2, 6)  # random tokens: sequences, and tokens in each


@dataclass(frozen=True)
class Call:
    """One call of a block, which can be repeated.

    Attributes:
        forward: The block's own forward.
        args: Its arguments by position.
        keywords: Its arguments by name.
        alone: Whether blocks can be run one by one, which shows that others need no more than its first output.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    alone: bool

    @property
    def given(self) -> torch.Tensor:
        """The hidden states that the block is given."""
        found: torch.Tensor = self.args[0] if self.args else self.keywords["hidden_states"]
        return found

    def run(self) -> list[torch.Tensor]:
        """Run the block; return the outputs that others may use, and what it leaves for them in its arguments."""
        args = _copied(self.args)
        keywords = _copied(self.keywords)
        outputs = tensors_in(self.forward(*args, **keywords))
        return [*(outputs[:1] if self.alone else outputs), *_left((args, keywords))]

    def passes_on(self) -> str:
        """Return what else than hidden states other blocks have from this one, nothing where there is nothing else."""
        args = _copied(self.args)
        keywords = _copied(self.keywords)
        before = len(_left((args, keywords)))
        returned = self.forward(*args, **keywords)
        first, *rest = returned if isinstance(returned, tuple | list) else (returned,)
        if len(_left((args, keywords))) > before:
            return "leaves keys and values for later blocks"
        if self.alone:
            return ""
        if any(value is not None for value in rest) or first.shape != self.given.shape or len(first) != PROBE[0]:
            return "returns more than hidden states"
        return ""


Inspect = Callable[[int, Call], None]


@torch.no_grad()
def probe_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    forward: Callable[[torch.Tensor], Any],
    inspect: Inspect,
    *,
    alone: bool,
) -> None:
    """Run a model once, and let ``inspect`` run each block on its inputs before it runs itself.

    Args:
        model: The model in eval mode.
        blocks: Its blocks.
        forward: Runs it on token ids.
        inspect: Given a block's index and its call.
        alone: As for ``Call``.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = generator(0, "sub-blocks").integers(len(embedding.weight), size=PROBE)

    def replacement(block: int, own: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        inspect(block, Call(own, args, keywords, alone))
        return own(*args, **keywords)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, partial(replacement, index, block.forward)))
        forward(torch.from_numpy(rows).to(embedding.weight.device))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return all floating-point tensors in what a module returned."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, MutableMapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def _left(value: Any) -> list[torch.Tensor]:
    """Return the tensors in tables among arguments, which a block may change."""
    args, keywords = value
    return [
        tensor
        for item in (*args, *keywords.values())
        if isinstance(item, MutableMapping)
        for tensor in tensors_in(item)
    ]


def _copied(value: Any) -> Any:
    """Return arguments with copies of their tensors and tables, which a block may change in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        return copy.copy(value)
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
