"""Loads a checkpoint through transformers: its code is never run, missing weights raise, quantized ones on request."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from evosweep.core.errors import ModelError
from evosweep.core.events import Progress
from evosweep.models.admission import AUTO, VISION_LANGUAGE, admit, block_size_of
from evosweep.models.checkpoint import check_finite, check_loaded, check_vocabulary, read_config, untied_as_stored
from evosweep.models.verify import first_line
from evosweep.models.weight_files import check_adapter_file, check_scale_grids, check_weight_files

ADAPTER = "adapter_config.json"
MERGE = "merge"
REFUSE = "refuse"
ADAPTERS = (REFUSE, MERGE)


def pretrained(
    path: str, *, dtype: torch.dtype, progress: Progress, kind: str = AUTO, dequantize: bool = False
) -> tuple[nn.Module, Any, Any]:
    """Return model, tokenizer and processor of a folder or hub id; the processor is None where it has none.

    Args:
        path: The checkpoint.
        dtype: Type of its weights.
        progress: Shows what is worth knowing.
        kind: ``text``, ``vision_language`` or ``auto``, as ``admission.admit``.
        dequantize: Whether a quantized checkpoint is dequantized.

    Raises:
        ModelError: The checkpoint cannot be used as it is.
    """
    config = read_config(path)
    admission = admit(path, config, kind=kind, dequantize=dequantize)
    if Path(path).is_dir() and not config.get("transformers_weights"):  # which names a file of its own
        check_weight_files(Path(path), quantized=admission.quantization is not None)
        check_scale_grids(Path(path), block_size_of(config))
    for note in admission.notes:
        progress.say(note)
    seeing = admission.kind == VISION_LANGUAGE
    loader: Any = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    settings = {} if admission.quantization is None else {"quantization_config": admission.quantization}
    with warnings.catch_warnings():  # of the checkpoint's own quantization, whose other settings are kept
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model, info = loader.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    left = check_loaded(path, model, info)
    if settings:
        forget_quantization(path, model, dtype)
    check_finite(path, model)
    tokenizer = _tokenizer(path)
    for line in (left, untied_as_stored(path, model), check_vocabulary(path, model, tokenizer)):
        if line:
            progress.say(line)
    return model, tokenizer, _processor(path) if seeing else None


def forget_quantization(path: str, model: Any, dtype: torch.dtype) -> None:
    """Make a dequantized model a dense one of one type.

    Args:
        path: The checkpoint, for messages.
        model: As transformers has dequantized it; changed.
        dtype: Type of its weights.

    Raises:
        ModelError: A layer is still quantized.
    """
    small = [name for name, value in model.named_parameters() if value.dtype.itemsize < 2]
    if small:
        raise ModelError(f"model.path: transformers {transformers.__version__} did not dequantize {small[0]} of {path}")
    for config in (model.config, model.config.get_text_config()):
        with contextlib.suppress(AttributeError):
            del config.quantization_config
    # By the conversions that were used at loading, saving would write a dense weight as codes without their scales.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        if attribute in vars(model):
            delattr(model, attribute)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of peft."""
    return (folder / ADAPTER).is_file()


def adapter_base(folder: Path, *, adapter: str) -> str:
    """Return the base model of an adapter that is to be merged into it.

    Args:
        folder: The adapter's.
        adapter: ``merge``, or ``refuse``.

    Raises:
        ModelError: It is to be refused, names no base model, or peft is not installed.
    """
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder / ADAPTER} cannot be read: {error}") from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base:
        raise ModelError(
            f"model.path: {folder} is an adapter ({ADAPTER}) that names no base model: merge it into its base model "
            "first (merge_and_unload of peft) and give that folder"
        )
    if adapter != MERGE:
        raise ModelError(
            f"model.path: {folder} is an adapter ({ADAPTER}) of {base}, not a whole model: merge it at loading with "
            "model.adapter=merge, or give the base model"
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError("model.adapter=merge needs peft: pip install 'evosweep[adapters]'")
    beside = folder / base
    return str(beside) if beside.is_dir() else str(base)


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """Return a model with an adapter's weights merged into it.

    Args:
        model: The base model.
        folder: Of the adapter.

    Raises:
        ModelError: The adapter lacks weights, cannot be merged, or does not fit the model.
    """
    import peft  # noqa: PLC0415 - an extra

    check_adapter_file(folder)
    try:
        with _quiet("peft"):
            settings = peft.PeftConfig.from_pretrained(str(folder))
            if settings.is_prompt_learning:
                kind = str(settings.peft_type.value)
                raise ModelError(f"model.path: {folder} is an adapter of prompts ({kind}): it has no weights to merge")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder))
            loaded = wrapped.load_adapter(str(folder), "default")  # once more, for what it says of the names
            _check_names(folder, missing=loaded.missing_keys, unexpected=loaded.unexpected_keys)
            found: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        raise ModelError(
            f"model.path: the adapter {folder} does not fit its base model: {first_line(error)}"
        ) from error
    return found


def _check_names(folder: Path, *, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ModelError where an adapter has weights for layers that its base lacks, or none for some: peft leaves both.

    Args:
        folder: Of the adapter.
        missing: Weights that the base model's layers wait for.
        unexpected: Weights that no layer of the base model takes.
    """
    names = [*unexpected, *missing]
    if names:
        what = "has no layer for" if unexpected else "gets nothing for"
        raise ModelError(
            f"model.path: the adapter {folder} does not fit its base model, which {what} {names[0]} "
            f"({len(names)} such weights): give the model that it was trained on"
        )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tokenizer(path: str) -> Any:
    """Return a checkpoint's tokenizer.

    Raises:
        ModelError: It has none, or one that needs Python code of its own.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        if "custom code" in str(error):
            raise ModelError(
                f"model.path: {path} has a tokenizer that needs its own Python code (auto_map in "
                "tokenizer_config.json), which is never run: put a tokenizer.json beside it"
            ) from error
        raise ModelError(f"model.path: {path} has no tokenizer that can be loaded: {first_line(error)}") from error


def _processor(path: str) -> Any:
    """Return what prepares images for a model; None where the checkpoint has none that can be made here."""
    try:
        return transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError):
        return None
