"""Models with further towers beside the text decoder: for images, sound or video."""

import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from evosweep.models.admission import AUTO, VISION_LANGUAGE, kind_of
from evosweep.models.blocks import find_blocks

CAUSAL = "AutoModelForCausalLM"
SEEING = "AutoModelForImageTextToText"


def has_towers(model: nn.Module) -> bool:
    """Return whether a model of transformers has other parts than a text decoder: its config holds one for that."""
    config: Any = model.config
    return config.get_text_config() is not config


def loader_name(model: nn.Module) -> str:
    """Return the name of the class of transformers that loads a model with all of its parts."""
    config: Any = model.config
    found = {"model_type": config.model_type, "architectures": [type(model).__name__]}
    return SEEING if kind_of("", found, AUTO) == VISION_LANGUAGE else CAUSAL


def loader_of(folder: Path) -> Any:
    """Return the class of transformers that loads the checkpoint in a folder with all of its parts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, SEEING if kind_of(str(folder), config, AUTO) == VISION_LANGUAGE else CAUSAL)


def towers(model: nn.Module) -> str:
    """Return one line on which part of a model is compressed and which stay as they are, with their sizes."""
    path, blocks = find_blocks(model)
    decoder = path.rpartition(".")[0]
    outside: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{decoder}."):
            part = ".".join(name.split(".")[:2])
            outside[part] = outside.get(part, 0) + parameter.numel() * parameter.element_size()
    parts = ", ".join(f"{part} ({size / 1e6:.3g} MB)" for part, size in outside.items())
    return f"the {len(blocks)} blocks of {path} are compressed; as they are: {parts or 'nothing'}"
