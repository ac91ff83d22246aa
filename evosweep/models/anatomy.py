"""A decoder taken apart: blocks, units, shared inputs, head. Found from the modules, not from a list of types.

One short probe forward pass shows which modules run, which linears are given the same tensor, and what a block
returns; nothing is assumed about names.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from evosweep.core.errors import ModelError
from evosweep.models.head import Head
from evosweep.models.patch import replaced_forward

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Site:
    """Where a unit sits.

    Attributes:
        name: Path of the module in the model.
        block: Index of its block.
        module: The linear layer itself.
        group: Name of the first unit that is given the very same input tensor (itself, if none other).
    """

    name: str
    block: int
    module: nn.Module
    group: str

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as (in, out), as GPT-2's Conv1D does."""
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as (out, in), whatever the module's own layout."""
        weight = self.module.weight
        return weight.T if self.transposed else weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return int(rows), int(columns)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Overwrite the module's weight with (out, in) values."""
        self.weight.copy_(weight)


class Anatomy:
    """A causal language model seen as embed -> blocks -> tail -> head.

    Args:
        model: A transformers causal language model in eval mode.

    Raises:
        ModelError: No list of blocks, or no linear layer in them, could be found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.block_path, self.blocks = find_blocks(model)
        self.base = _base_model(model, self.block_path)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._contexts: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        with torch.no_grad():
            self.sites = self._probe()

    @cached_property
    def head(self) -> Head:
        """From final hidden state to logits."""
        return Head.of(self.model, self.base)

    def sites_of(self, block: int) -> list[Site]:
        """Return the units of one block, in the order in which they run."""
        return [site for site in self.sites if site.block == block]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the first block is given, shape (batch, seq_len, hidden), for token ids (batch, seq_len)."""
        return self._through_base(tokens, None)[0]

    def finish(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head is given, for what the last block returned; both (batch, seq_len, hidden)."""
        return self._through_base(tokens, hidden)[1]

    def run_block(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one block on hidden states (batch, seq_len, hidden) of any batch size, wherever they lie."""
        arguments, keywords = self._context(hidden.shape[1])[index]
        return _first(self.blocks[index](hidden.to(self.device), *arguments, **keywords))

    def _context(self, seq_len: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each block is given beside the hidden states: masks and positions, the same for every window."""
        if seq_len not in self._contexts:
            tokens = torch.zeros((1, seq_len), dtype=torch.long, device=self.device)
            heard: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def hear(position: int, *args: Any, **kwargs: Any) -> Any:
                del position
                heard.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
                return self._wrap(_given(args, kwargs))

            self._run_base(tokens, hear)
            self._contexts[seq_len] = heard
        return self._contexts[seq_len]

    def _through_base(self, tokens: torch.Tensor, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the base model with blocks that pass on what they are given; the last one returns ``last``."""
        first: list[torch.Tensor] = []

        def pass_on(position: int, *args: Any, **kwargs: Any) -> Any:
            given = _given(args, kwargs)
            if position == 0:
                first.append(given)
            return self._wrap(last if last is not None and position == len(self.blocks) - 1 else given)

        final = self._run_base(tokens, pass_on)
        return first[0], final

    def _run_base(self, tokens: torch.Tensor, replacement: Callable[..., Any]) -> torch.Tensor:
        with ExitStack() as stack:
            for position, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, partial(replacement, position)))
            return _first(self.base(input_ids=tokens, use_cache=False))

    def _wrap(self, hidden: torch.Tensor) -> Any:
        return (hidden, *self._rest) if self._returns_tuple else hidden

    def _probe(self) -> list[Site]:
        inputs: dict[str, torch.Tensor] = {}
        names = {
            name: module
            for name, module in self.model.named_modules()
            if name.startswith(self.block_path + ".") and isinstance(module, nn.Linear | Conv1D)
        }
        if not names:
            kinds = sorted({type(module).__name__ for module in self.blocks.modules()})
            raise ModelError(f"the blocks of this model have no linear layer that we know, only {', '.join(kinds)}")
        returned: list[Any] = []
        with ExitStack() as stack:
            for name, module in names.items():
                stack.callback(module.register_forward_pre_hook(partial(_remember, inputs, name)).remove)
            stack.callback(self.blocks[0].register_forward_hook(lambda _m, _a, out: returned.append(out)).remove)
            tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=self.device)
            self.base(input_ids=tokens, use_cache=False)
        self._returns_tuple = isinstance(returned[0], tuple)
        self._rest = (None,) * (len(returned[0]) - 1) if self._returns_tuple else ()
        return [
            Site(name=name, block=self._block_of(name), module=names[name], group=_group(name, inputs))
            for name in inputs
        ]

    def _block_of(self, name: str) -> int:
        return int(name.removeprefix(self.block_path + ".").split(".")[0])


def _remember(inputs: dict[str, torch.Tensor], name: str, module: nn.Module, args: Sequence[Any]) -> None:
    del module
    inputs.setdefault(name, args[0])


def _group(name: str, inputs: Mapping[str, torch.Tensor]) -> str:
    mine = inputs[name]
    return next(
        other
        for other, tensor in inputs.items()
        if tensor is mine or (tensor.data_ptr() == mine.data_ptr() and tensor.shape == mine.shape)
    )


def _base_model(model: nn.Module, block_path: str) -> nn.Module:
    """Return the outermost module around the blocks that the model calls to get final hidden states.

    Some models reach past their own base model, so the call itself is listened to.
    """
    called: list[nn.Module] = []
    parts = block_path.split(".")[:-1]
    with ExitStack() as stack, torch.no_grad():
        for depth in range(1, len(parts) + 1):
            around = model.get_submodule(".".join(parts[:depth]))
            stack.callback(around.register_forward_hook(lambda module, _args, _out: called.append(module)).remove)
        device = next(model.parameters()).device
        model(input_ids=torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=device), use_cache=False)
    if not called:
        raise ModelError(f"{type(model).__name__} has no base model under its head, so it is no causal language model")
    return called[-1]  # the outermost returns last


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and ModuleList of the decoder's blocks: as many as the config says there are layers."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [(name, module) for name, module in lists.items() if len(module) == count]
    if not fitting:
        raise ModelError(
            f"{type(model).__name__}: none of its module lists ({', '.join(lists) or 'it has none'}) has the "
            f"{count} blocks that its config names"
        )
    return fitting[0]


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return value[0]
