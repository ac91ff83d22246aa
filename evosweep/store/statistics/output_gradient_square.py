"""The mean square of the loss's gradient at every layer's output, of the dense model on the calibration windows.

It is the diagonal of the output-side Fisher factor (as in K-FAC, Martens and Grosse, arXiv 1503.05671, section 3.1).
The model is run with one block's activations at a time: a forward pass that keeps what every block is given, then block
after block from the last to the first, each run again with gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional

from evosweep.core.events import Progress
from evosweep.models.anatomy import Anatomy
from evosweep.store.statistics.base import mean_over_tokens

GRAPH_SHARE = 8  # a run with gradients keeps about so many times as much as one without


def measure_model(
    anatomy: Anatomy, windows: torch.Tensor, *, batch_tokens: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """Return unit name -> mean over tokens of (∂L/∂y)², fp32, shape (out,).

    y is the unit's output, L the sum of the next-token losses (nats) of the token's window.

    Args:
        anatomy: The dense model.
        windows: This process's calibration windows on the model's device, shape (windows, seq_len).
        batch_tokens: Tokens that may run through the model at once without gradients.
        progress: Shows how far it is.
    """
    totals = {slot.name: torch.zeros(slot.shape[0], device=anatomy.device) for slot in anatomy.slots}
    at_once = 1 if anatomy.whole_because else max(1, batch_tokens // GRAPH_SHARE // windows.shape[1])
    for tokens in progress.track(windows.split(at_once), description="measuring gradients"):
        if anatomy.whole_because:
            _through_model(anatomy, tokens, totals)
            continue
        with torch.no_grad():
            given = [anatomy.embed(tokens)]
            for block in range(len(anatomy.blocks)):
                given.append(anatomy.run_block(block, given[-1], tokens))
        gradient = _gradient_of_loss(anatomy, tokens, given.pop())
        for block in reversed(range(len(anatomy.blocks))):
            gradient = _back_through(anatomy, block, given.pop(), gradient, totals, tokens)
    return {name: mean_over_tokens(total, windows.numel()) for name, total in totals.items()}


@torch.enable_grad()
def _gradient_of_loss(anatomy: Anatomy, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return ∂L/∂(output of the last block), one window's logits at a time; both (windows, seq_len, hidden)."""
    last = last.detach().requires_grad_()
    final = anatomy.finish(tokens, last)
    (gradient,) = torch.autograd.grad(final, last, _gradient_at_head(anatomy, tokens, final))
    return gradient


def _gradient_at_head(anatomy: Anatomy, tokens: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Return ∂L/∂(final hidden states), one window's logits at a time.

    Args:
        anatomy: The model.
        tokens: Token ids (windows, seq_len).
        final: Final hidden states (windows, seq_len, hidden).
    """
    at_head = torch.zeros_like(final)
    for index, window in enumerate(tokens):
        hidden = final[index].detach().requires_grad_()
        labels = anatomy.pictures.labels(window)[1:]
        loss = functional.cross_entropy(anatomy.head.logits(hidden)[:-1], labels, reduction="sum")
        (at_head[index],) = torch.autograd.grad(loss, hidden)
    return at_head


@torch.enable_grad()
def _back_through(
    anatomy: Anatomy,
    block: int,
    given: torch.Tensor,
    gradient: torch.Tensor,
    totals: dict[str, torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Return ∂L/∂(input of a block), and count the gradients at the outputs of its layers.

    Args:
        anatomy: The model.
        block: Index of the block.
        given: Its input.
        gradient: ∂L/∂(its output).
        totals: Sums of squares by unit, to which the block's are added.
        tokens: Token ids (windows, seq_len).
    """
    outputs: list[tuple[str, torch.Tensor]] = []

    given = given.detach().requires_grad_()
    with ExitStack() as stack:
        stack.enter_context(_on_device(anatomy.blocks[block], anatomy.device))
        for slot in anatomy.slots_of(block):
            stack.callback(slot.module.register_forward_hook(_recorder(slot.name, outputs)).remove)
        result = anatomy.run_block(block, given, tokens)
        wanted = [given, *(output for _, output in outputs)]
        gradients = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    _count(totals, outputs, gradients[1:])
    return gradients[0]


@torch.enable_grad()
def _through_model(anatomy: Anatomy, tokens: torch.Tensor, totals: dict[str, torch.Tensor]) -> None:
    """Count the gradients at the outputs of all layers, with the activations of the whole model kept.

    Args:
        anatomy: The model, whose blocks cannot be run one by one.
        tokens: Token ids (windows, seq_len).
        totals: Sums of squares by unit, to which the model's are added.
    """
    outputs: list[tuple[str, torch.Tensor]] = []
    embedding = anatomy.outer["embedding"].module
    with ExitStack() as stack:
        hook = embedding.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_())
        stack.callback(hook.remove)
        for slot in anatomy.slots:
            stack.callback(slot.module.register_forward_hook(_recorder(slot.name, outputs)).remove)
        final = anatomy.run_whole(tokens)
    at_head = _gradient_at_head(anatomy, tokens, final)
    gradients = torch.autograd.grad(final, [output for _, output in outputs], at_head, allow_unused=True)
    _count(totals, outputs, gradients)


def _count(
    totals: dict[str, torch.Tensor],
    outputs: Sequence[tuple[str, torch.Tensor]],
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """Add the squares of gradients at layers' outputs.

    Args:
        totals: Sums of squares by unit.
        outputs: Unit name and output.
        gradients: Of each output.
    """
    for (name, output), found in zip(outputs, gradients, strict=True):
        if found is not None:
            totals[name] += found.float().reshape(-1, output.shape[-1]).square().sum(dim=0)


def _recorder(name: str, outputs: list[tuple[str, torch.Tensor]]) -> Callable[..., None]:
    """Return a forward hook that appends a layer's output, under its name, to a list."""
    return lambda module, args, output: outputs.append((name, output))


@contextmanager
def _on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a block's weights on a device until its gradients are calculated, also where blocks only visit it."""
    homes = [(tensor, tensor.data) for tensor in [*block.parameters(), *block.buffers()]]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home
