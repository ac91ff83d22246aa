"""Checks a checkpoint: its files before it is loaded, its missing and unused tensors afterwards."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from evosweep.core.errors import ModelError, SettingError

BUFFERS = re.compile(r"(masked_bias|inv_freq|attn\.bias|attention\.bias|position_ids)$")
"""Constants that older versions of transformers saved with a model."""
OTHER_MODALITIES = re.compile(r"(^|[._])(vision|visual|image|vit|multi_modal|mm|audio|speech|video|mtp|nextn)[._]")
"""Towers for other inputs than text, and extra prediction layers: not used in scoring text."""
SHOWN = 3  # names of tensors in a message


def read_config(path: str) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json, no code of the checkpoint run.

    Raises:
        OSError: There is none.
    """
    config, _ = transformers.PretrainedConfig.get_config_dict(path)
    return dict(config)


def check_vocabulary(path: str, model: nn.Module, tokenizer: Any) -> str | None:
    """Return a note where the tokenizer has added tokens that the model does not know, None where it has none.

    Args:
        path: The checkpoint, for messages.
        model: The loaded model.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: The tokenizer's own vocabulary is larger than the model's.
    """
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"model.path: {path} has a tokenizer of {tokenizer.vocab_size} tokens and a model of {rows}: they do not "
            "belong together"
        )
    unknown = sorted(str(token) for token, index in tokenizer.get_added_vocab().items() if index >= rows)
    return f"the model has no row for the tokens {_names(unknown)}: text must not hold them" if unknown else None


def check_folder(folder: Path) -> None:
    """Raise ModelError where a folder holds something else than a whole model."""
    if (folder / "packed.json").is_file():
        raise ModelError(f"model.path: {folder} is a packed export of evosweep; a dense model is needed")
    if folder.is_file():
        kind = "; a GGUF is not read, give the checkpoint that it was made from" if folder.suffix == ".gguf" else ""
        raise ModelError(f"model.path: {folder} is a file, not the folder of a model{kind}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder} is not a model folder (it has no config.json)")


def check_loaded(path: str, model: nn.Module, info: Mapping[str, Any]) -> str | None:
    """Return a note on tensors that were left out, None where all were used.

    Args:
        path: The checkpoint, for messages.
        model: The loaded model.
        info: What ``from_pretrained(..., output_loading_info=True)`` says.

    Raises:
        ModelError: Tensors are missing, have another shape, or do not belong to the model.
    """
    name = type(model).__name__
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path: {path} is no whole {name}: it lacks {_names(missing)} (weights are never made up)"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ModelError(
            f"model.path: {path} does not fit its config.json: {key} has shape {tuple(found)}, {name} needs "
            f"{tuple(expected)} ({len(mismatched)} such tensors)"
        )
    unexpected = sorted(key for key in info["unexpected_keys"] if not BUFFERS.search(key))
    strange = [key for key in unexpected if not OTHER_MODALITIES.search(key)]
    if strange:
        raise ModelError(f"model.path: {path} does not fit its config.json: {name} has no place for {_names(strange)}")
    return f"not loaded, as text does not need them: {_names(unexpected)}" if unexpected else None


def untied_as_stored(path: str, model: nn.Module) -> str | None:
    """Return a note where a checkpoint ties its head by config.json but stores another one; its config is then untied.

    transformers loads both weights and leaves the config as it was, so that an export with either of them missing would
    be tied when it is loaded again.

    Args:
        path: The checkpoint, for messages.
        model: The loaded model; its config is changed.
    """
    any_model: Any = model
    head = any_model.get_output_embeddings()
    tied = getattr(any_model, "_tied_weights_keys", None)
    if not tied or getattr(head, "weight", None) is None or head.weight is any_model.get_input_embeddings().weight:
        return None
    configs = [any_model.config, any_model.config.get_text_config()]
    if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return None
    for config in configs:
        config.tie_word_embeddings = False
    return f"config.json of {path} ties the head to the embedding, and its weights hold two: they stay two"


def check_finite(path: str, model: nn.Module) -> None:
    """Raise ModelError where a parameter of a loaded model has NaN or infinite values.

    A run on text does not see all of them: those of an expert that no token is routed to, or of a rare token's row.

    Args:
        path: The checkpoint, for messages.
        model: The loaded model.
    """
    broken = [name for name, value in model.named_parameters() if value.is_floating_point() and not _finite(value)]
    if broken:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"model.path: {path} has NaN or infinite values in {_names(broken)}, read as {dtype}: the checkpoint is "
            "damaged, or model.dtype is too narrow for it (float32 has the widest range)"
        )


def _finite(values: torch.Tensor) -> bool:
    # Their sum is finite where all of them are, unless it overflows: one pass over memory and no copy.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def check_length(model: nn.Module, seq_len: int) -> str | None:
    """Return a warning where windows are longer than a model was trained for, None where they are not.

    Args:
        model: A transformers model.
        seq_len: Tokens of the longest window.

    Raises:
        SettingError: The model has learned positions, and fewer of them.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or seq_len <= limit:
        return None
    if _learned_positions(model, limit):
        raise SettingError(
            "tokens.seq_len", allowed=f"at most {limit}, the positions that this model has learned", got=seq_len
        )
    return f"tokens.seq_len={seq_len} is longer than the {limit} positions that this model was made for"


def _learned_positions(model: nn.Module, limit: int) -> bool:
    """Return whether the model has an embedding with one row a position (OPT and others have two more)."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    return any(limit <= module.num_embeddings <= limit + 2 for module in embeddings)


def _names(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
