"""A format that is a layer function and no weight: inputs are rounded before they are multiplied."""

from collections.abc import Mapping
from typing import Any

import torch

from evosweep.compressors.payload import LayerFunction, Payload


def apply(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], parts: Mapping[str, Payload]) -> LayerFunction:
    del parts
    return lambda inputs: (inputs * meta["steps"]).round() / meta["steps"] @ tensors["weight"].T
