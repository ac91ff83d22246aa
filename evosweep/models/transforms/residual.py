"""Rotation of the residual stream: gains folded, means subtracted by the writers, all of it multiplied with Q.

Written for a stream of row vectors x, which becomes x Q: embeddings E Q, writers Qᵀ W and Qᵀ b, readers W diag(gain) Q
(QuaRot, arXiv 2404.00456, section 4; SliceGPT, arXiv 2401.15024, section 3).
"""

from typing import Any

import torch
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.models.slots import LinearSlot
from evosweep.models.transforms.wiring import Norm, Wiring

LEAST_GAIN = 1e-6  # of the largest; a LayerNorm's bias cannot be divided by less


def rotate_stream(wiring: Wiring, q: torch.Tensor) -> None:
    """Rotate the residual stream of a model in place; its head must be untied.

    A model with LayerNorms needs a Q that keeps the vector of ones: the stream then has zero mean and keeps it, so that
    a LayerNorm subtracts nothing (SliceGPT, section 3.1, where RMSNorm takes its place).

    Args:
        wiring: Of the model.
        q: An orthogonal matrix, shape (hidden, hidden), float64.

    Raises:
        ModelError: The bias of a norm cannot be kept.
    """
    for embedding in wiring.embeddings:
        _store(embedding.weight, _written(embedding.weight.detach().double(), wiring, q))
    for slot in wiring.writers:
        slot.write(_written(slot.read().detach().double().T, wiring, q).T)
        bias = _bias_of(slot)
        if bias is not None:
            _store(bias, _written(bias.detach().double()[None], wiring, q)[0])
    for norm in wiring.norms:
        if not norm.after:
            _fold(norm, q)


def untie(model: nn.Module) -> int:
    """Give a head that shares the embedding's weight one of its own; return the bits that this adds."""
    any_model: Any = model
    head = any_model.get_output_embeddings()
    if head is None or head.weight is not any_model.get_input_embeddings().weight:
        return 0
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    any_model.all_tied_weights_keys = {}
    for config in (any_model.config, any_model.config.get_text_config()):
        config.tie_word_embeddings = False
    return int(head.weight.numel() * head.weight.element_size() * 8)


def _written(rows: torch.Tensor, wiring: Wiring, q: torch.Tensor) -> torch.Tensor:
    """Return rows that are added to the stream, centered where its norms subtract the mean, times Q."""
    centered = rows - rows.mean(-1, keepdim=True) if wiring.centers else rows
    return centered @ q.to(rows.device)


def _fold(norm: Norm, q: torch.Tensor) -> None:
    """Fold a norm's gain into its readers and rotate them; a bias goes into theirs, or stays in the norm, rotated."""
    biases = [_bias_of(reader) for reader in norm.readers]
    into_readers = all(bias is not None for bias in biases)
    for reader, bias in zip(norm.readers, biases, strict=True):
        weight = reader.read().detach().double()
        gain = norm.gain.to(weight.device)
        if into_readers and bias is not None:
            _store(bias, bias.detach().double() + weight @ norm.bias.to(weight.device))
        reader.write((weight * gain) @ q.to(weight.device))
    module: Any = norm.module
    if getattr(module, "weight", None) is not None:
        _store(module.weight, torch.full_like(norm.gain, 1.0 - norm.offset))
    if getattr(module, "bias", None) is not None:
        _store(module.bias, torch.zeros_like(norm.bias) if into_readers else _kept_bias(norm) @ q.to(norm.bias.device))


def _kept_bias(norm: Norm) -> torch.Tensor:
    """Return a norm's bias over its gain: what the readers multiply with the gain again.

    Raises:
        ModelError: A gain is zero where the bias is not.
    """
    small = norm.gain.abs() <= LEAST_GAIN * norm.gain.abs().max()
    if bool((small & (norm.bias != 0)).any()):
        raise ModelError(f"the norm {norm.name} cannot be folded: it has a bias where its gain is zero")
    return torch.where(small, 0.0, norm.bias / torch.where(small, 1.0, norm.gain))


def _bias_of(slot: LinearSlot) -> nn.Parameter | None:
    bias = getattr(slot.module, "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def _store(parameter: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
