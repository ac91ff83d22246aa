"""Products with the Hessian of the KL in each layer's weight: top eigenvalues for HAWQ, traces for HAWQ-V2."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from evosweep.models.anatomy import Anatomy
from evosweep.models.fused import plain_norms
from evosweep.models.slots import Slot

HESSIAN = 9  # a forward pass, one backward and one through both cost as much as so many forward passes
CHUNK = 2**30  # most weights whose Hessian is multiplied at once
LONGEST = 512  # tokens of a window that are used: attention with second derivatives stores its whole matrix


def chunks_of(slots: Sequence[Slot], most: int = CHUNK) -> list[list[int]]:
    """Return indices of slots in groups of whole blocks that have at most so many weights, one block at least.

    Args:
        slots: In the order in which they run.
        most: Weights in a group.
    """
    groups: list[list[int]] = []
    weights = 0
    for index, slot in enumerate(slots):
        own = [other for other in slots if other.block == slot.block]
        new_block = index == 0 or slots[index - 1].block != slot.block
        size = sum(other.shape[0] * other.shape[1] for other in own)
        if index == 0 or (new_block and weights + size > most):
            groups.append([])
            weights = 0
        weights += size if new_block else 0
        groups[-1].append(index)
    return groups


class Curvature:
    """The Hessian of the KL from the dense model, at its weights, of some layers on some text.

    The KL's gradient is zero there, so its Hessian is the Fisher information Jᵀ (diag p − p pᵀ) J summed over tokens,
    with J the logits' derivative; a product with it is the derivative of a gradient. Only what follows the layers keeps
    its graph, so fewer layers at once, and later ones, take less memory.

    Args:
        anatomy: The dense model.
        slots: The layers.
        ids: Token ids (rows, seq_len); only the first ``LONGEST`` of each row are used.
    """

    def __init__(self, anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor) -> None:
        self.slots = slots
        parameters = {id(slot.parameter): slot.parameter for slot in slots}
        self._parameters = list(parameters.values())
        self._owner = [list(parameters).index(id(slot.parameter)) for slot in slots]
        with _differentiable(self._parameters):
            kl = _kl(anatomy, ids)
            self._gradients = torch.autograd.grad(kl, self._parameters, create_graph=True)

    def product(self, vectors: Mapping[int, torch.Tensor], *, last: bool = False) -> dict[int, torch.Tensor]:
        """Return the rows of H v that belong to the slots of ``vectors``, by slot index, each (out, in), fp32.

        Args:
            vectors: Parts of v by slot index, each (out, in); the rest of v is zero.
            last: Whether the graph may be thrown away.
        """
        owners = sorted({self._owner[index] for index in vectors})
        products = [
            (self.slots[index].view(self._gradients[self._owner[index]]).float() * vector).sum()
            for index, vector in vectors.items()
        ]
        along = torch.stack(products).sum()
        wanted = [self._parameters[owner] for owner in owners]
        with _differentiable(wanted):
            found = torch.autograd.grad(along, wanted, retain_graph=not last)
        by_owner = dict(zip(owners, found, strict=True))
        return {index: self.slots[index].view(by_owner[self._owner[index]]).float() for index in vectors}


@contextmanager
def _differentiable(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let some parameters have gradients of gradients while the context lasts."""
    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def top_eigenvalue(curvature: Curvature, index: int, *, iterations: int, seed: int) -> float:
    """Return the top eigenvalue of one layer's block of the Hessian, by power iteration, as HAWQ (arXiv 1905.03696).

    Args:
        curvature: Of that layer, perhaps among others.
        index: Of the slot.
        iterations: Products with the Hessian.
        seed: Of the first vector.
    """
    slot = curvature.slots[index]
    rng = torch.Generator(slot.parameter.device).manual_seed(seed)
    vector = torch.randn(slot.shape, generator=rng, device=slot.parameter.device)
    value = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm().clamp(min=torch.finfo(torch.float32).tiny)
        product = curvature.product({index: vector})[index]
        value = float((vector * product).sum())
        vector = product
    return max(value, 0.0)


def hutchinson(anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Return vᵀ H v of every layer's block at a random v of signs, shape (slots,): its mean over v is the trace.

    All layers of a chunk are multiplied at once, as in HAWQ-V2 (arXiv 1911.03852): products of different layers'
    signs are zero on average.

    Args:
        anatomy: The dense model.
        slots: The layers, in the order in which they run.
        ids: Token ids (rows, seq_len).
        seed: Of the signs.
    """
    found = torch.zeros(len(slots), dtype=torch.float64, device=ids.device)
    for indices in chunks_of(slots):
        curvature = Curvature(anatomy, [slots[index] for index in indices], ids)
        rng = torch.Generator(ids.device).manual_seed(seed)
        signs = {position: _signs(slots[index].shape, rng) for position, index in enumerate(indices)}
        products = curvature.product(signs, last=True)
        for position, index in enumerate(indices):
            found[index] = (signs[position] * products[position]).sum(dtype=torch.float64)
    return found


def _signs(shape: Sequence[int], rng: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(0, 2, tuple(shape), generator=rng, device=rng.device, dtype=torch.int8)
    return (2 * drawn - 1).float()


def input_products(
    anatomy: Anatomy, slots: Sequence[Slot], ids: torch.Tensor, seed: int
) -> list[tuple[torch.Tensor, float]]:
    """Return the inputs of every layer, and vᵀ H v at random signs v, with H the Hessian of the KL in those inputs.

    The mean of vᵀ H v over v is the trace that HAWQ-V2 weighs an activation's rounding by (arXiv 1911.03852).
    All layers are multiplied at once; layers that are given one tensor are told apart.

    Args:
        anatomy: The dense model.
        slots: Linear layers, or the head.
        ids: Token ids (rows, seq_len); only the first ``LONGEST`` of each row are used.
        seed: Of the signs.

    Raises:
        ModelError: A slot is one expert of several.
    """
    seen: dict[int, torch.Tensor] = {}

    def own(index: int, *given: Any) -> tuple[Any, ...]:
        values, *rest = given[1]  # after the module
        seen[index] = values.view_as(values) if values.requires_grad else values.detach().requires_grad_(True)
        return (seen[index], *rest)

    with _differentiable([]), ExitStack() as stack:
        for index, slot in enumerate(slots):
            slot.watch_inputs(lambda _: None).remove()  # raises for an expert
            stack.callback(slot.module.register_forward_pre_hook(partial(own, index)).remove)
        kl = _kl(anatomy, ids)
        inputs = [seen[index] for index in range(len(slots))]
        gradients = torch.autograd.grad(kl, inputs, create_graph=True)
        rng = torch.Generator(ids.device).manual_seed(seed)
        signs = [_signs(values.shape, rng) for values in inputs]
        along = torch.stack([(one.float() * sign).sum() for one, sign in zip(gradients, signs, strict=True)]).sum()
        products = torch.autograd.grad(along, inputs)
    sums = [float((one.float() * sign).sum(dtype=torch.float64)) for one, sign in zip(products, signs, strict=True)]
    return [(values.detach(), product) for values, product in zip(inputs, sums, strict=True)]


def _kl(anatomy: Anatomy, ids: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of the KL of the model from itself: zero, with the derivatives of the KL."""
    with plain_norms(anatomy.blocks):
        logits = anatomy.model(**anatomy.arguments(ids[:, :LONGEST]), use_cache=False).logits.flatten(0, 1).float()
    log_q = logits.log_softmax(-1)
    log_p = log_q.detach()
    return (log_p.exp() * (log_p - log_q)).sum()
