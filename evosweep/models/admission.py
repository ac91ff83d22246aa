"""Checks what a checkpoint's config.json says, before anything is loaded; each that cannot be used gets one line."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from evosweep.core.errors import ModelError

AUTO = "auto"
TEXT = "text"
VISION_LANGUAGE = "vision_language"
KINDS = (AUTO, TEXT, VISION_LANGUAGE)
OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|NextSentencePrediction|"
    r"ImageClassification|AudioClassification|Classification|RewardModel|Reward|SequenceRanking)$"
)
"""Architectures whose head says something else than the next token."""
ENCODERS = re.compile(r"For(MaskedLM|MaskedLanguageModeling|PreTraining)$|^(Bert|Roberta|XLMRoberta|ModernBert)Model$")
"""Architectures that see tokens on both sides."""
DEQUANTIZED: Mapping[str, Callable[..., Any]] = {
    "fp8": transformers.FineGrainedFP8Config,
    "mxfp4": transformers.Mxfp4Config,
    "compressed-tensors": transformers.CompressedTensorsConfig,
}
"""Methods that transformers dequantizes on a CPU, and the class of their settings."""


@dataclass(frozen=True)
class Admission:
    """How a checkpoint is loaded.

    Attributes:
        kind: ``text``, or ``vision_language`` through the class that holds all towers.
        quantization: Settings by which transformers dequantizes it; None: it is dense.
        notes: Lines for the user.
    """

    kind: str
    quantization: Any = None
    notes: tuple[str, ...] = ()


def admit(path: str, config: Mapping[str, Any], *, kind: str = AUTO, dequantize: bool = False) -> Admission:
    """Return how a checkpoint is loaded.

    Args:
        path: The checkpoint, for messages.
        config: Content of its config.json.
        kind: ``text``, ``vision_language``, or ``auto``.
        dequantize: Whether a quantized one may be dequantized.

    Raises:
        ModelError: It is quantized, needs Python code of its own, or is no causal language model.
    """
    note = check_code(path, config)
    notes = [note] if note else []
    check_decoder(path, config)
    loaded_as = kind_of(path, config, kind)
    quantization = dequantization(path, config, dequantize=dequantize)
    if quantization is not None:
        notes.append(f"{quantization_of(config)} weights are dequantized; what comes out is not the dense original")
    return Admission(loaded_as, quantization, tuple(notes))


def check_code(path: str, config: Mapping[str, Any]) -> str | None:
    """Return a note where a checkpoint brings Python code that is not needed, None where it brings none.

    Args:
        path: The checkpoint, for messages.
        config: Content of its config.json.

    Raises:
        ModelError: It needs that code.
    """
    if not config.get("auto_map"):
        return None
    model_type = _type(config)
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model.path: {path} needs its own Python code (auto_map in config.json), which is never run; "
            f"this transformers has no model type {model_type!r}"
        )
    return f"the Python code in {path} is not run; transformers' own {model_type} is used"


def check_decoder(path: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError where a checkpoint's config says that it does not predict the next token of a text.

    Args:
        path: The checkpoint, for messages.
        config: Content of its config.json.
    """
    model_type = _type(config)
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"model.path: {path} is an encoder-decoder ({model_type}), not a decoder: give a causal language model"
        )
    names = _architectures(config)
    heads = [name for name in names if OTHER_HEADS.search(name)]
    if heads and len(heads) == len(names):
        raise ModelError(
            f"model.path: {path} has a head for other answers than the next token ({heads[0]}): give the language "
            "model that it was made from"
        )
    encoders = [name for name in names if ENCODERS.search(name)]
    if encoders and len(encoders) == len(names) and not config.get("is_decoder"):
        raise ModelError(
            f"model.path: {path} is an encoder ({encoders[0]}), which sees the tokens after a place too: give a causal "
            "language model"
        )
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    if model_type in CONFIG_MAPPING and model_type not in known:
        raise ModelError(f"model.path: {path} is a {model_type}, for which transformers has no causal language model")


def kind_of(path: str, config: Mapping[str, Any], kind: str) -> str:
    """Return whether a checkpoint is loaded as ``text`` or ``vision_language``.

    Args:
        path: The checkpoint, for messages.
        config: Content of its config.json.
        kind: What was asked for; ``auto`` is vision_language where the checkpoint's architecture is.

    Raises:
        ModelError: transformers has no such class for it.
    """
    model_type = _type(config)
    vision = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if kind == AUTO:
        return VISION_LANGUAGE if vision and (not text or vision in _architectures(config)) else TEXT
    if kind == VISION_LANGUAGE and not vision:
        raise ModelError(
            f"model.kind: {path} is a {model_type}, for which transformers has no model of images and text: "
            "model.kind=text"
        )
    if kind == TEXT and not text and vision:
        raise ModelError(
            f"model.kind: {path} is a {model_type}, whose text model transformers does not load alone: "
            "model.kind=vision_language"
        )
    return kind


def dequantization(path: str, config: Mapping[str, Any], *, dequantize: bool) -> Any:
    """Return the settings by which transformers dequantizes a checkpoint, None where that is dense.

    Args:
        path: The checkpoint, for messages.
        config: Content of its config.json.
        dequantize: Whether it may be dequantized.

    Raises:
        ModelError: It is quantized, and dequantizing was not asked for or is not possible.
    """
    method = quantization_of(config)
    if method is None:
        return None
    made_from = "give the dense checkpoint that it was made from"
    if method not in DEQUANTIZED:
        raise ModelError(f"model.path: {path} is already quantized ({method}); {made_from}")
    if not dequantize:
        raise ModelError(
            f"model.path: {path} is already quantized ({method}); {made_from}, or dequantize it: model.dequantize=true"
        )
    if method == "compressed-tensors" and _asymmetric(_quantization(config)):
        raise ModelError(
            f"model.path: {path} is already quantized (compressed-tensors with zero points), which transformers "
            f"dequantizes wrongly; {made_from}"
        )
    return DEQUANTIZED[method](dequantize=True)


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a checkpoint is quantized, None where it is dense."""
    found = _quantization(config)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return "an unreadable quantization_config"
    bitsandbytes = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = found.get("quant_method") or ("bitsandbytes" if bitsandbytes else "an unnamed method")
    return json.dumps(method).strip('"')


def block_size_of(config: Mapping[str, Any]) -> Any:
    """Return rows and columns of the blocks that have one scale in an FP8 checkpoint, None where there are none."""
    found = _quantization(config)
    return found.get("weight_block_size") if isinstance(found, Mapping) else None


def _quantization(config: Mapping[str, Any]) -> Any:
    parts = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    found = (part.get("quantization_config") or part.get("compression_config") for part in (config, *parts))
    return next((section for section in found if section), None)


def _asymmetric(settings: Mapping[str, Any]) -> bool:
    """Return whether any group of a compressed-tensors config has zero points."""
    groups = settings.get("config_groups") or {}
    weights = [(group or {}).get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
    return any(part.get("symmetric") is False for part in weights)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or []]


def _type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type") or "")
