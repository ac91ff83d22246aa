"""Facts and tensors as bytes, which processes send each other."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save

FACTS = "facts"  # name of the JSON among a message's tensors
LENGTH = 8  # bytes of a message's length in front of it
Tensors = Mapping[str, torch.Tensor]
Message = tuple[dict[str, Any], dict[str, torch.Tensor]]


def packed(facts: Mapping[str, Any], tensors: Tensors) -> torch.Tensor:
    """Return facts, as JSON, and tensors as uint8, with their number in front."""
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    data = save({**on_cpu, FACTS: text})
    return torch.frombuffer(bytearray(len(data).to_bytes(LENGTH, "little") + data), dtype=torch.uint8)


def unpacked(message: torch.Tensor) -> Message:
    """Return the facts and tensors of ``packed``, behind which anything may stand."""
    given = memoryview(message.numpy())
    tensors = load(bytes(given[LENGTH : LENGTH + int.from_bytes(given[:LENGTH], "little")]))
    return json.loads(tensors.pop(FACTS).numpy().tobytes()), tensors
