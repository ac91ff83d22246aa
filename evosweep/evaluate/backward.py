"""Backward passes of the dense model, in which each layer's gradient is read and thrown away as soon as it is there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from evosweep.models.anatomy import Anatomy
from evosweep.models.device import free_bytes
from evosweep.models.patch import replaced_forward
from evosweep.models.slots import Slot

KEPT = 40  # tensors of hidden size that a block keeps of a token for its backward pass
SHARE = 0.5  # of free memory that all blocks' may take
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits (rows, seq_len, vocabulary) in fp32 and token ids (rows, seq_len) to the sum over tokens of a loss."""
Visit = Callable[[int, torch.Tensor], None]
"""Called with a slot's index and the gradient (out, in) of its weight."""
Outputs = tuple[torch.Tensor, torch.Tensor]
"""A layer's inputs (rows, seq_len, in), and the gradient of its outputs (rows, seq_len, out)."""
VisitOutputs = Callable[[int, Outputs], None]
"""Called with a slot's index, and what was seen of its outputs."""


def sampled_labels(seed: int) -> Loss:
    """Return −log p(y) at labels y drawn from the model itself: the expected square of its gradient is the Fisher's.

    Args:
        seed: Chooses the labels.
    """

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rng = torch.Generator(ids.device).manual_seed(seed)
        flat = logits.flatten(0, 1)
        labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=rng)[:, 0]
        return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")

    return loss


def next_tokens(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the sum of −log p of the tokens that come next in the text."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def fits(anatomy: Anatomy, tokens: int) -> bool:
    """Return whether what all blocks keep of so many tokens for a backward pass fits half of the free memory."""
    hidden = int(anatomy.head.weight.shape[1])
    bytes_of_all = KEPT * hidden * anatomy.dtype.itemsize * tokens * len(anatomy.blocks)
    return bytes_of_all <= SHARE * free_bytes(anatomy.device)


@contextmanager
def bounded_memory(anatomy: Anatomy, tokens: int) -> Iterator[None]:
    """Let a backward pass over so many tokens run, while the context lasts, in the memory that is free.

    Where all blocks together do not fit, each keeps its input alone and runs again when its turn comes, which costs a
    forward pass more and gives the same gradients.
    """
    with ExitStack() as stack:
        for block in [] if fits(anatomy, tokens) else anatomy.blocks:
            again = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, again))
        yield


def visit_gradients(anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor, *, loss: Loss, visit: Visit) -> None:
    """Call ``visit`` with the gradient of a loss in the weight of each slot, never keeping more than one gradient.

    Args:
        anatomy: The model, as its weights are now.
        slots: Whose weights; several may be views of one parameter.
        ids: Token ids (rows, seq_len).
        loss: What is differentiated.
        visit: Reads a gradient.
    """
    owners: dict[int, list[int]] = {}
    for index, slot in enumerate(slots):
        owners.setdefault(id(slot.parameter), []).append(index)

    def read(indices: Sequence[int], parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        for index in indices:
            visit(index, slots[index].view(parameter.grad))
        parameter.grad = None

    with ExitStack() as stack, torch.enable_grad():
        for indices in owners.values():
            parameter = slots[indices[0]].parameter
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(read, indices)).remove)
        stack.enter_context(bounded_memory(anatomy, ids.numel()))
        logits = anatomy.model(**anatomy.arguments(ids), use_cache=False).logits.float()
        loss(logits, anatomy.pictures.labels(ids)).backward()


def visit_outputs(
    anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor, *, loss: Loss, visit: VisitOutputs
) -> None:
    """Call ``visit`` with inputs of each slot and the gradient of a loss in its outputs; no weight's gradient is made.

    Args:
        anatomy: The model, as its weights are now.
        slots: Linear layers, embedding or head.
        ids: Token ids (rows, seq_len).
        loss: What is differentiated.
        visit: Reads them.

    Raises:
        ModelError: A slot is one expert of several.
    """
    inputs: dict[int, torch.Tensor] = {}

    def watch(index: int, output: torch.Tensor) -> None:
        if output.requires_grad:
            given = inputs.pop(index)
            output.register_hook(lambda gradient: visit(index, (given, gradient)))

    with ExitStack() as stack, torch.enable_grad():
        model: Any = anatomy.model
        source = model.get_input_embeddings()
        stack.callback(source.register_forward_hook(lambda _m, _a, output: output.requires_grad_(True)).remove)
        for index, slot in enumerate(slots):
            stack.callback(slot.watch_inputs(partial(_remember, inputs, index)).remove)
            stack.callback(slot.module.register_forward_hook(partial(_pass_output, partial(watch, index))).remove)
        stack.enter_context(bounded_memory(anatomy, ids.numel()))
        logits = anatomy.model(**anatomy.arguments(ids), use_cache=False).logits.float()
        loss(logits, anatomy.pictures.labels(ids)).backward()


def _remember(inputs: dict[int, torch.Tensor], index: int, given: torch.Tensor) -> None:
    inputs[index] = given.detach()


def _pass_output(watch: Callable[[torch.Tensor], None], *module_inputs_output: Any) -> None:
    watch(module_inputs_output[-1])
