"""Finds a decoder's structure by running it: blocks, slots, shared inputs, head; no list of model types is needed.

One short forward pass shows which modules run, which linear layers are given the same tensor, and what a block
returns; nothing is assumed about names. Another one checks that running the blocks one by one gives what the whole
model gives.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.data.pictures import Pictures
from evosweep.models.contexts import Arguments, Contexts
from evosweep.models.decoder import find_blocks
from evosweep.models.experts import (
    find_listed,
    find_mixtures,
    find_packed,
    listed_slots,
    packed_mixtures,
    packed_slots,
    same_input,
    with_listed,
)
from evosweep.models.grouped_rows import first_tensor
from evosweep.models.head import Head
from evosweep.models.patch import replaced_forward
from evosweep.models.probe import Inspect, probe_blocks
from evosweep.models.rescaling import undo_rescaling
from evosweep.models.rows import passed_by, slot_kind_of
from evosweep.models.slots import LinearSlot, OuterSlot, Slot, outer_slots
from evosweep.models.sublayers import Sublayer, find_sublayers
from evosweep.models.verify import (
    check_causal,
    check_whole,
    not_by_row,
    sharing,
    why_not_block_by_block,
    why_not_on_text,
)

PROBE_TOKENS = 8


class Anatomy:
    """The structure of a causal language model, and its forward in steps: embed, blocks, finish, head.

    Args:
        model: A transformers causal language model in eval mode.
        text: Token ids (windows, seq_len) on which blocks that run one by one must give what the model gives, beside a
            few random ones: a mask may differ from window to window only where they are long.
        pictures: The images that windows of token ids hold.

    Attributes:
        model: The same.
        block_path: Path of the list of blocks in the model.
        blocks: The list of blocks.
        base: The module around the blocks that returns final hidden states.
        rescaling: Whether the model rescaled its weights in place when it ran, which it does not any more.
        slots: All slots in the blocks, in the order in which they run.
        device: Where the model's first parameter is.
        dtype: Its type.
        whole_because: Why the blocks cannot be run one by one, so that the whole model runs instead; empty: they can.
        not_by_row: Layers that are no slots because rows of a population with different weights of them do not give
            what each gives alone, or because they share a parameter, and what is wrong then.

    Raises:
        ModelError: No list of blocks, or no linear layer in them, could be found; the model is not causal, gives NaN,
            or cannot be run on several rows at once with the same result.
    """

    def __init__(self, model: nn.Module, text: torch.Tensor | None = None, pictures: Pictures | None = None) -> None:
        self.model = model
        self.pictures = pictures or Pictures()
        self.rescaling = undo_rescaling(model)
        self.block_path, self.blocks = find_blocks(model)
        expected = check_causal(model, next(model.parameters()).device)
        self.base = base_model(model, self.block_path)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._contexts = Contexts(self._record, vocabulary=vocabulary, device=self.device, sees=self.pictures.in_any)
        with torch.no_grad():
            self.slots: list[Slot] = self._probe()
        self.whole_because = ""
        self.whole_because = why_not_block_by_block(self, expected) or why_not_on_text(self, text)
        if self.whole_because:
            check_whole(self, expected)
        self.not_by_row = {**not_by_row(self, self.slots), **sharing(self.slots, model)}
        self.slots = _without(self.slots, self.not_by_row)
        self._contexts.forget()

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the model is run, a line each."""
        name = type(self.model).__name__
        notes = []
        if self.whole_because:
            notes.append(
                f"{name} is scored and calibrated as a whole, which takes longer: its blocks cannot be run one by one "
                f"({self.whole_because})"
            )
        if self.rescaling:
            notes.append(f"{name} runs without the rescaling of its weights that it does in place, and is exported so")
        if self.not_by_row:
            first, fault = next(iter(self.not_by_row.items()))
            notes.append(f"{len(self.not_by_row)} layers stay as they are, as {first}: {fault}")
        return notes

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
        """Attention, MLP and other parts of every block that can be missing alone."""
        return find_sublayers(self.model, path=self.block_path, slots=self.slots, probe=self.probe_blocks)

    def probe_blocks(self, inspect: Inspect) -> None:
        """Run the model once on a few random tokens; ``inspect`` may run each block again, as ``probe`` says."""
        probe_blocks(self.model, self.blocks, self.run_whole, inspect, alone=not self.whole_because)

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
        return self._as_head(self._through_base(self.pictures.plain(tokens), hidden)[1])

    def run_block(self, index: int, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output of one block for hidden states (batch, seq_len, hidden) on any device.

        Args:
            index: Of the block.
            hidden: Its input; all windows of ``tokens`` once for each row of a population, row by row.
            tokens: Token ids (windows, seq_len), which some models' blocks need.
        """
        arguments, keywords = self._contexts.of(index, hidden.shape, tokens)
        return _first(self.blocks[index](hidden.to(self.device), *arguments, **keywords))

    def run_whole(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return final hidden states (batch, seq_len, hidden) of token ids (batch, seq_len), by the model's forward."""
        return self._as_head(_first(self.base(**self.arguments(tokens), use_cache=False)))

    def arguments(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model's forward is given for token ids (batch, seq_len): these, and the images they hold."""
        return self.pictures.arguments(tokens, dtype=self.dtype)

    def around(self, first: int, last: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what one block is given and what it or a later one returns, while the whole model runs.

        Args:
            first: Index of the block whose input is wanted.
            last: Index of the block whose output is.
            tokens: Token ids (batch, seq_len).
        """
        found: list[torch.Tensor] = []
        with ExitStack() as stack:
            before = self.blocks[first].register_forward_pre_hook(
                lambda _module, args, kwargs: found.append(_given(args, kwargs).clone()), with_kwargs=True
            )
            stack.callback(before.remove)
            behind = self.blocks[last].register_forward_hook(lambda _m, _a, out: found.append(_first(out).clone()))
            stack.callback(behind.remove)
            self.run_whole(tokens)
        return found[0], found[1]

    def _as_head(self, final: torch.Tensor) -> torch.Tensor:
        """Return final hidden states in the head's type: some models' streams are fp32 whatever their weights are."""
        return final.to(self.head.weight.dtype)

    def run(self, tokens: torch.Tensor, *, without: Collection[int] = ()) -> torch.Tensor:
        """Return final hidden states (batch, seq_len, hidden) of token ids (batch, seq_len), the cheapest way.

        Args:
            tokens: The token ids.
            without: Indices of blocks that pass their input on.
        """
        if self.whole_because:
            rows = torch.zeros(1, dtype=torch.long, device=self.device)
            with ExitStack() as stack:
                for block in without:
                    stack.enter_context(passed_by(self.blocks[block], rows, 1))
                return self.run_whole(tokens)
        with torch.no_grad():
            hidden = self.embed(tokens)
        for block in range(len(self.blocks)):
            if block not in without:
                hidden = self.run_block(block, hidden, tokens)
        return self.finish(tokens, hidden)

    def prepare(self, seq_len: int, tokens: torch.Tensor | None = None) -> None:
        """Record what blocks are given beside hidden states of windows of a length; ``run_block`` does where needed.

        Args:
            seq_len: The length.
            tokens: Token ids (windows, seq_len) that will run.
        """
        self._contexts.prepare(seq_len, tokens)

    def forget_contexts(self) -> None:
        """Let masks and positions be made anew: those of a run in inference mode cannot be used with gradients."""
        self._contexts.forget()

    def _record(self, tokens: torch.Tensor) -> list[Arguments]:
        """Return the arguments of every block beside hidden states, for token ids (batch, seq_len)."""
        recorded: list[Arguments] = []

        def record(position: int, *args: Any, **kwargs: Any) -> Any:
            del position
            recorded.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
            return self._wrap(_given(args, kwargs))

        self._run_base(tokens, record)
        return recorded

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
            return _first(self.base(**self.arguments(tokens), use_cache=False))

    def _wrap(self, hidden: torch.Tensor) -> Any:
        return hidden if self._returns is None else self._returns((hidden, *self._rest))

    def _probe(self) -> list[Slot]:
        inputs: dict[str, torch.Tensor] = {}
        mixtures = find_mixtures(self.model, self.block_path)
        listed = find_listed(self.model, self.block_path)
        packed = find_packed(self.model, self.block_path)
        kinds: dict[str, tuple[type[LinearSlot], nn.Module]] = {}
        for name, module in self.model.named_modules():
            kind = slot_kind_of(module)
            if name.startswith(self.block_path + ".") and kind is not None:
                kinds[name] = kind, module
        if not kinds and not mixtures:
            known = sorted({type(module).__name__ for module in self.blocks.modules()})
            raise ModelError(f"the blocks of this model have no linear layer that we know, only {', '.join(known)}")
        returned: list[Any] = []
        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, (_, module) in kinds.items():
                stack.callback(module.register_forward_pre_hook(partial(_remember, inputs, name)).remove)
                stack.callback(module.register_forward_hook(partial(_remember_output, outputs, name)).remove)
            marked = {
                *mixtures,
                *(mixture.name for mixture in listed),
                *(name for outer in packed.values() for name in outer),
            }
            for name in marked:
                mark = partial(_remember_first, inputs, name)
                stack.callback(self.model.get_submodule(name).register_forward_pre_hook(mark, with_kwargs=True).remove)
            stack.callback(self.blocks[0].register_forward_hook(lambda _m, _a, out: returned.append(out)).remove)
            tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=self.device)
            self.base(input_ids=tokens, use_cache=False)
        if not returned:
            raise ModelError(
                f"{type(self.model).__name__}: the blocks of {self.block_path} do not run on text alone, so its text "
                "decoder was not found; give the text model alone"
            )
        self._returns: type | None = type(returned[0]) if isinstance(returned[0], tuple | list) else None
        self._rest = () if self._returns is None else (None,) * (len(returned[0]) - 1)
        # A router may be a linear layer that returns its choices, too.
        layers = {name: given for name, given in inputs.items() if isinstance(outputs.get(name), torch.Tensor)}
        slots: list[Slot] = []
        for name in inputs:
            if name in mixtures:
                slots += mixtures[name].slots
            elif name in layers:
                kind, module = kinds[name]
                slots.append(kind(name=name, block=self._block_of(name), module=module, group=same_input(name, layers)))
        for mixture in listed:
            if mixture.name in inputs:
                width = inputs[mixture.name].shape[-1]
                experts = listed_slots(mixture, self._block_of(mixture.name), width)
                slots = with_listed(slots, mixture, experts, list(inputs))
        for packs in packed_mixtures(self.model, packed, inputs):
            slots = with_listed(slots, packs, packed_slots(packs, self._block_of(packs.name)), list(inputs))
        return slots

    def _block_of(self, name: str) -> int:
        return int(name.removeprefix(self.block_path + ".").split(".")[0])


def _remember(inputs: dict[str, torch.Tensor], name: str, module: nn.Module, args: Sequence[Any]) -> None:
    del module
    inputs.setdefault(name, args[0] if args else torch.empty(0))


def _remember_first(
    inputs: dict[str, torch.Tensor],
    name: str,
    module: nn.Module,
    args: Sequence[Any],
    keywords: Mapping[str, Any],
) -> None:
    """Keep the first tensor that a module is given; arguments as for ``_remember``."""
    del module
    inputs.setdefault(name, first_tensor((args, keywords)))


def _remember_output(outputs: dict[str, Any], name: str, module: nn.Module, args: Sequence[Any], output: Any) -> None:
    del module, args
    outputs[name] = output


def _without(slots: Sequence[Slot], gone: Collection[str]) -> list[Slot]:
    """Return slots without some of them; the first that is left of those with one input gives the group its name."""
    if not gone:
        return list(slots)
    left: list[Any] = [slot for slot in slots if slot.name not in gone]
    names: dict[str, str] = {}
    for slot in left:
        names.setdefault(slot.group, slot.name)
    return [replace(slot, group=names[slot.group]) for slot in left]


def base_model(model: nn.Module, block_path: str) -> nn.Module:
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
    head = model.get_output_embeddings()  # type: ignore[operator]
    below = [module for module in called if all(inner is not head for inner in module.modules())]
    return (below or called)[-1]  # the outermost returns last


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return value[0]
