"""Finds a decoder's structure by running it: blocks, slots, shared inputs, head; no list of model types is needed.

One short forward pass shows which modules run, which linear layers are given the same tensor, and what a block
returns; nothing is assumed about names. Another one checks that running the blocks one by one gives what the whole
model gives.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.models.head import Head
from evosweep.models.patch import replaced_forward
from evosweep.models.slots import LinearSlot, OuterSlot, Slot, outer_slots, slot_kind
from evosweep.models.sublayers import Inspect, Sublayer, find_sublayers, probe_blocks
from evosweep.models.verify import check_block_by_block, check_causal

PROBE_TOKENS = 8


class Anatomy:
    """The structure of a causal language model, and its forward in steps: embed, blocks, finish, head.

    Args:
        model: A transformers causal language model in eval mode.

    Attributes:
        model: The same.
        block_path: Path of the list of blocks in the model.
        blocks: The list of blocks.
        base: The module around the blocks that returns final hidden states.
        slots: All slots in the blocks, in the order in which they run.
        device: Where the model's first parameter is.
        dtype: Its type.

    Raises:
        ModelError: No list of blocks, or no linear layer in them, could be found; the model is not causal, gives NaN,
            or cannot be run block by block with the same result.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.block_path, self.blocks = find_blocks(model)
        expected = check_causal(model, next(model.parameters()).device)
        self.base = _base_model(model, self.block_path)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._contexts: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        with torch.no_grad():
            self.slots: list[Slot] = self._probe()
        check_block_by_block(self, expected)
        self._contexts.clear()

    @cached_property
    def head(self) -> Head:
        """The output layer, from final hidden states to logits."""
        return Head.of(self.model, self.base)

    @cached_property
    def outer(self) -> dict[str, OuterSlot]:
        """The slots outside of the blocks: ``embedding``, and ``head`` where that is a tensor of its own."""
        return outer_slots(self.model, len(self.blocks))

    @cached_property
    def all_slots(self) -> list[Slot]:
        """The embedding, the slots in the blocks, and the head where it is a tensor of its own."""
        return sorted([*self.outer.values(), *self.slots], key=lambda slot: slot.block)

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Attention, MLP and the like of every block: what can be missing alone."""
        return find_sublayers(self.model, path=self.block_path, slots=self.slots, probe=self.probe_blocks)

    def probe_blocks(self, inspect: Inspect) -> None:
        """Run the model once on a few random tokens; ``inspect`` may run each block again, as ``sublayers`` says."""
        probe_blocks(self.model, self.blocks, lambda tokens: self.base(input_ids=tokens, use_cache=False), inspect)

    def slot(self, name: str) -> Slot:
        """Return the slot with a name; KeyError where there is none."""
        return self._by_name[name]

    def slots_of(self, block: int) -> list[Slot]:
        """Return the slots of one block, in the order in which they run."""
        return [slot for slot in self.slots if slot.block == block]

    @cached_property
    def _by_name(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.all_slots}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the input of the first block, shape (batch, seq_len, hidden), for token ids (batch, seq_len)."""
        return self._through_base(tokens, None)[0]

    def finish(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states for the last block's output, both of shape (batch, seq_len, hidden).

        Args:
            tokens: The token ids (batch, seq_len) that were embedded.
            hidden: Output of the last block.
        """
        return self._through_base(tokens, hidden)[1]

    def run_block(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of one block for hidden states (batch, seq_len, hidden) on any device."""
        arguments, keywords = self._context(hidden.shape[1])[index]
        return _first(self.blocks[index](hidden.to(self.device), *arguments, **keywords))

    def prepare(self, seq_len: int) -> None:
        """Record what blocks are given beside hidden states of windows of a length; ``run_block`` does where needed."""
        self._context(seq_len)

    def forget_contexts(self) -> None:
        """Let masks and positions be made anew: those of a run in inference mode cannot be used with gradients."""
        self._contexts.clear()

    def _context(self, seq_len: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the further arguments of every block: masks and positions, the same for every window."""
        if seq_len not in self._contexts:
            tokens = torch.zeros((1, seq_len), dtype=torch.long, device=self.device)
            recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def record(position: int, *args: Any, **kwargs: Any) -> Any:
                del position
                recorded.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
                return self._wrap(_given(args, kwargs))

            self._run_base(tokens, record)
            self._contexts[seq_len] = recorded
        return self._contexts[seq_len]

    def _through_base(self, tokens: torch.Tensor, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first block's input, and the base model's output where every block returns its input.

        The last block returns ``last`` instead, if it is given.
        """
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

    def _probe(self) -> list[Slot]:
        inputs: dict[str, torch.Tensor] = {}
        kinds: dict[str, tuple[type[LinearSlot], nn.Module]] = {}
        for name, module in self.model.named_modules():
            kind = slot_kind(module)
            if name.startswith(self.block_path + ".") and kind is not None:
                kinds[name] = kind, module
        if not kinds:
            known = sorted({type(module).__name__ for module in self.blocks.modules()})
            raise ModelError(f"the blocks of this model have no linear layer that we know, only {', '.join(known)}")
        returned: list[Any] = []
        with ExitStack() as stack:
            for name, (_, module) in kinds.items():
                stack.callback(module.register_forward_pre_hook(partial(_remember, inputs, name)).remove)
            stack.callback(self.blocks[0].register_forward_hook(lambda _m, _a, out: returned.append(out)).remove)
            tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=self.device)
            self.base(input_ids=tokens, use_cache=False)
        self._returns_tuple = isinstance(returned[0], tuple)
        self._rest = (None,) * (len(returned[0]) - 1) if self._returns_tuple else ()
        return [
            kinds[name][0](name=name, block=self._block_of(name), module=kinds[name][1], group=_group(name, inputs))
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

    Some models call a module inside of their base model directly, so a hook records which one is called.
    """
    called: list[nn.Module] = []
    names = block_path.split(".")[:-1]
    with ExitStack() as stack, torch.no_grad():
        for depth in range(1, len(names) + 1):
            around = model.get_submodule(".".join(names[:depth]))
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
