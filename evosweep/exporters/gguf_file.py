"""Export as a GGUF for llama.cpp and everything built on it: one file with weights, settings and tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.base import Compressor, LevelSpec
from evosweep.compressors.formats.ggml_layout import TYPES
from evosweep.compressors.ggml_types import GgmlTypes
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.several import single
from evosweep.core.checks import check_choice
from evosweep.core.errors import SettingError
from evosweep.exporters.base import Exporter, Winner
from evosweep.exporters.gguf_tensors import FAMILIES, FROM_CODES, Family, Stored, Tensors
from evosweep.exporters.gguf_tokenizer import add_tokenizer
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.units import Units

FILE = "model.gguf"
TYPES_WRITTEN = ("exact", "f32")
OTHERS = ("dense", "packed", "none")
PLAIN_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


@dataclass(frozen=True)
class GgufFile(Exporter):
    """Writes one GGUF that holds exactly what was scored, and the tokenizer as transformers has it beside it.

    Levels of ``compressor=gguf`` are written byte for byte. Symmetric codes of 4, 5 and 8 bits in groups of a multiple
    of 32 become Q4_0, Q5_0 and Q8_0 of the same values. What is no unit keeps the model's type; vectors are fp32.

    Args:
        enabled: Whether to export at all.
        check_tokens: Validation tokens on which the reloaded model's logits are compared with the scored ones.
        type: ``exact``: every level as the type that holds it. ``f32``: all weights as numbers, whatever the levels.
        pre_tokenizer: llama.cpp's name of the rule that splits text before merges; ``auto`` finds it.
    """

    type: str = "exact"
    pre_tokenizer: str = "auto"

    contents = "a GGUF for llama.cpp"
    loading = (
        "from transformers import AutoConfig, AutoModelForCausalLM\n\n"
        "config = AutoConfig.from_pretrained(folder)\n"
        f'model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="{FILE}", config=config)'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("type", self.type, TYPES_WRITTEN)
        if not isinstance(self.pre_tokenizer, str) or not self.pre_tokenizer:
            raise SettingError("pre_tokenizer", allowed="auto or llama.cpp's name of one", got=self.pre_tokenizer)

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        model: Any = anatomy.model
        config = model.config.get_text_config()
        family = FAMILIES.get(config.model_type)
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, Mapping)}
        if family is None:
            self._refuse(f"it knows {', '.join(FAMILIES)} models, not {config.model_type}")
        if kinds - {"default"}:
            self._refuse(f"it does not carry rotary embeddings of the type {', '.join(sorted(kinds))} over")
        if config.model_type == "mistral" and getattr(config, "sliding_window", None):
            self._refuse("llama.cpp has no sliding window in this family")
        if drop.granularity == "sublayers" or (drop.granularity != "none" and family is not None and family.numbered):
            self._refuse("llama.cpp has no such blocks: drop=blocks for other families, drop=none for this one")
        layers = (units or Units()).layers(anatomy)
        if any(slot.layout != "linear" for slot in layers):
            self._refuse("it has no layout for this model's layers")
        if self.type == "exact":
            hint = next(_misfits(compressor, {slot.name: slot.shape for slot in layers}), "")
            for name, outer in (units.compressors(anatomy) if units is not None else {}).items():
                slot = next(slot for slot in anatomy.outer.values() if slot.name == name)
                hint = hint or next(_misfits(outer, {name: slot.shape}), "")
            if hint:
                self._refuse(hint)
        drop.check_export(anatomy)

    def _refuse(self, hint: str) -> None:
        raise SettingError("", owner=self, allowed=OTHERS, got="gguf", hint=hint)

    def expected_bytes(self, winner: Winner) -> int:
        """Return the counted bytes, or four for each parameter."""
        if self.type == "f32":
            return 4 * winner.dense_bytes // winner.evaluator.anatomy.dtype.itemsize
        return winner.packed_bytes

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``model.gguf``, and the config by which transformers reads it.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        loaded.tokenizer.save_pretrained(folder)
        model: Any = loaded.model
        config = model.config.get_text_config()
        family = FAMILIES[config.model_type]
        writer = gguf.GGUFWriter(folder / FILE, family.arch)
        with winner.in_place():
            _readable(model.config).save_pretrained(folder)
            _add_settings(writer, config, family, name=loaded.name)
            rows = len(model.get_input_embeddings().weight)
            add_tokenizer(writer, loaded, folder, pre=self.pre_tokenizer, vocabulary=rows)
            sizes: dict[str, int] = {}
            for tensor in Tensors(winner, family, expanded=self.type == "f32"):
                _add(writer, tensor)
                sizes[tensor.kind] = sizes.get(tensor.kind, 0) + int(np.prod(tensor.shape))
        most = max(sizes, key=lambda kind: sizes[kind])
        writer.add_file_type(TYPES[most].file_type if most in TYPES else PLAIN_FILE_TYPES[most])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through transformers, which reads GGUF by ggml's own Python package."""
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=FILE, config=config, dtype=dtype, trust_remote_code=False
        )
        return model


def _readable(config: Any) -> Any:
    """Return the config by which transformers reads the file: its reader knows Mistral's files as Llama's only."""
    if config.model_type != "mistral":
        return config
    return transformers.LlamaConfig(
        **{**config.to_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )


def _add(writer: gguf.GGUFWriter, tensor: Stored) -> None:
    # int8 and not uint8: for bytes the writer would count the shape anew, by a table without the newest types.
    writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.shape, raw_dtype=tensor.number)


def _add_settings(writer: gguf.GGUFWriter, config: Any, family: Family, *, name: str) -> None:
    """Write what llama.cpp needs to know of a model.

    Args:
        writer: Of the file.
        config: The model's, without the blocks that are dropped.
        family: Of the model.
        name: Of the model.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if family.rotary:
        writer.add_rope_dimension_count(head)
    if family.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def _misfits(compressor: Compressor, shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield what is wrong with each level that no type holds: unit, level, and the nearest that fits.

    Args:
        compressor: Makes the levels.
        shapes: (out, in) by unit name.
    """
    for part in single(compressor):
        if isinstance(part, GgmlTypes):
            unread = [kind for kind in part.types if not hasattr(gguf.GGMLQuantizationType, kind)]
            yield from (
                f"the installed gguf cannot read {kind} back: leave it out of compressor.types" for kind in unread
            )
        elif not isinstance(part, AsIs):
            for unit, levels in part.plan(shapes).items():
                for level in levels:
                    wrong = _misfit(part, level, shapes[unit][1])
                    if wrong:
                        yield f"no type of ggml holds {unit} at {level.name}: {wrong}; or export.type=f32"


def _misfit(compressor: Compressor, level: LevelSpec, columns: int) -> str:
    """Return what to set so that a level fits; nothing if it does.

    Args:
        compressor: Makes it.
        level: As planned.
        columns: Inputs of the layer.
    """
    if not isinstance(compressor, IntegerLevels):
        return "compressor=gguf makes levels of its types"
    if not compressor.symmetric:
        return "compressor.symmetric=true, or compressor=gguf"
    width = int(level.nominal.number)
    fits = [held for held in FROM_CODES if held != 2]
    if width not in fits:
        near = min(fits, key=lambda held: abs(held - width))
        return f"{near}bit is the nearest that fits (compressor.bits={fits}), or compressor=gguf"
    if compressor.group_of(columns) % TYPES[FROM_CODES[width]].block:
        return "compressor.group must be a multiple of 32"
    return ""
