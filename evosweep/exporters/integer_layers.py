"""Exports of integer levels: what formats with codes, scales and zeros in groups of columns have in common."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file, save_file

from evosweep.compressors.as_is import AsIs
from evosweep.compressors.base import Compressor
from evosweep.compressors.formats import grouped_int, plain
from evosweep.compressors.integer import IntegerLevels
from evosweep.compressors.several import single
from evosweep.core.errors import SettingError
from evosweep.core.files import write_json
from evosweep.core.unit import Level, Unit
from evosweep.exporters.base import Exporter, Winner
from evosweep.exporters.compressed_layers import integer_parts
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.expert_slots import slot_at
from evosweep.models.load import LoadedModel
from evosweep.store.manifest import Stored
from evosweep.store.units import Units

TENSORS = "model.safetensors"
CONFIG = "config.json"
CLOSE = 0.01  # share by which files may be larger than what was counted without a word about it
WHOLE = 16.0  # bits of a level that is the layer as it is

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class IntegerLayer:
    """A layer of integer codes; its weight is (code − zero)·scale.

    Columns are in the model's own order, and a column's group is its index divided by the size of groups, whatever the
    order in which they were rounded.

    Attributes:
        codes: uint8, shape (rows, columns).
        scales: fp16, shape (rows, groups).
        zeros: uint8, shape (rows, groups); the middle code where the level is symmetric.
        width: Bits a code.
        symmetric: Whether all zeros are the middle code.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    width: int
    symmetric: bool

    @classmethod
    def of(cls, stored: Stored) -> "IntegerLayer":
        """Return the layer that a level of ``formats/grouped_int`` is."""
        rows, columns, width, group = (int(stored.meta[key]) for key in ("rows", "columns", "width", "group"))
        tensors = stored.tensors()
        groups = columns // group
        symmetric = "zeros" not in tensors
        if symmetric:
            zeros = torch.full((rows, groups), 2 ** (width - 1), dtype=torch.uint8)
        else:
            zeros = grouped_int.unpack(tensors["zeros"], width, rows * groups).view(rows, groups)
        codes = grouped_int.unpack(tensors["codes"], width, rows * columns).view(rows, columns)
        return cls(codes, tensors["scales"].view(rows, groups), zeros, width, symmetric)

    @property
    def group(self) -> int:
        """Columns a group."""
        return self.codes.shape[1] // self.scales.shape[1]


@dataclass(frozen=True)
class Shape:
    """How a layer's codes are written, as the config says it; layers that are as they are have none.

    Attributes:
        width: Bits a code.
        group: Columns a group.
        symmetric: Whether all zeros are the middle code.
    """

    width: int
    group: int
    symmetric: bool


@dataclass(frozen=True)
class IntegerExporter(Exporter):
    """Base of exporters whose formats hold integer codes with a scale and a zero a group, a width for each layer.

    Only whole blocks may be dropped: those that stay are numbered anew.
    """

    name: ClassVar[str]
    """Of the file in ``conf/export``."""
    widths: ClassVar[tuple[int, ...]]
    """Bits a code may have."""
    groups: ClassVar[tuple[int, ...]]
    """Columns a group may have; 0 stands for a whole row."""
    multiple: ClassVar[tuple[int, int]] = (1, 32)
    """What outputs and inputs of a layer must be multiples of."""
    outer: ClassVar[bool] = False
    """Whether the format holds integers of embedding and head."""
    engine_loading: ClassVar[str]
    """Python code that makes a ``model`` of a ``folder`` with the engine that the format is for."""
    column_bits: ClassVar[int] = 0
    """What a column takes beside its codes."""
    half_only: ClassVar[bool] = False
    """Whether the engine runs models in 16 bits alone, so that the config of a float32 one must say float16."""
    metadata: ClassVar[str] = "pt"
    """What the file of tensors says that it was made with."""

    def check(self, compressor: Compressor, drop: Drop, anatomy: Anatomy, units: Units | None = None) -> None:
        """Raise SettingError where the format cannot hold what a search may choose.

        Args:
            compressor: Makes the levels.
            drop: What may be dropped.
            anatomy: The model.
            units: What is a unit beside the layers of the blocks.
        """
        outer = {} if units is None else units.compressors(anatomy)
        layers = (units or Units()).layers(anatomy)
        makers = {**{slot.name: compressor for slot in layers}, **outer}
        hint = ""
        if not all(isinstance(part, IntegerLevels | AsIs) for maker in makers.values() for part in single(maker)):
            hint = "it holds bit-widths in groups, and layers as they are: compressor=gptq"
        elif drop.granularity == "sublayers":
            hint = "it cannot hold a block without its attention or MLP: drop=blocks"
        elif outer and not self.outer:
            hint = "it leaves embedding and head as they are: units=none"
        elif any(slot.layout != "linear" for slot in layers):
            hint = "it has no layout for this model's transposed or fused layers"
        hint = hint or self.unheld(anatomy, [part for maker in makers.values() for part in integer_parts(maker)])
        if hint:
            raise SettingError("", owner=self, allowed=("dense", "packed", "none"), got=self.name, hint=hint)
        drop.check_export(anatomy)
        for slot in anatomy.all_slots:
            for part in integer_parts(makers[slot.name]) if slot.name in makers else []:
                self._check_group(slot.name, slot.shape[1], part.group_of(slot.shape[1]))

    def unheld(self, anatomy: Anatomy, parts: list[IntegerLevels]) -> str:
        """Return what else the format cannot hold, as a hint for an error; nothing where it can.

        Args:
            anatomy: The model.
            parts: The compressors of integers.
        """
        del anatomy, parts
        return ""

    def _check_group(self, name: str, columns: int, group: int) -> None:
        if group in self.groups or (group == columns and 0 in self.groups):
            return
        fitting = [size for size in self.groups if size and not columns % size]
        nearest = f"; the nearest that fits is {min(fitting, key=lambda size: abs(size - group))}" if fitting else ""
        held = ", ".join(str(size) for size in self.groups if size) + (" or whole rows" if 0 in self.groups else "")
        raise SettingError(
            "",
            owner=self,
            got=f"groups of {group} of {name}",
            allowed=f"of a format that holds them, this one holds groups of {held}{nearest}",
        )

    def refusal(self, layer: Unit, level: Level, anatomy: Anatomy) -> str:
        """Return why the format cannot hold a level of a layer; nothing where it can.

        Args:
            layer: A layer, or what can be dropped.
            level: One of its levels.
            anatomy: The model.
        """
        if level.nominal is None or level.nominal.kind != "bits" or level.nominal.number == WHOLE:
            return ""
        if int(level.nominal.number) not in self.widths:
            return f"this one holds {', '.join(map(str, self.widths))} bits"
        sizes = dict(zip(("outputs", "inputs"), anatomy.slot(layer.name).shape, strict=True))
        for (side, size), multiple in zip(sizes.items(), self.multiple, strict=True):
            if size % multiple:
                return f"the layer has {size} {side}, and this one needs a multiple of {multiple}"
        return ""

    def tensors_of(self, layer: IntegerLayer, dtype: torch.dtype) -> Tensors:
        """Return a layer's tensors by their names in its module.

        Args:
            layer: Codes, scales and zeros.
            dtype: Type of the model.
        """
        raise NotImplementedError

    def weight_of(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """Return the fp32 weight (out, in) of what ``tensors_of`` returned.

        Args:
            tensors: By their names in the layer's module.
            shape: As the config says it.
        """
        raise NotImplementedError

    def config_of(self, shapes: Mapping[str, Shape], whole: list[str], blocks: str) -> dict[str, Any]:
        """Return what ``config.json`` says of the quantization beside the model's own config.

        Args:
            shapes: How each layer is written, by path.
            whole: Paths of the linear layers that are as they are.
            blocks: Path of the blocks.
        """
        raise NotImplementedError

    def engine_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what else the engine reads of a model's ``config.json``, under names of its own."""
        del config
        return {}

    def shapes_of(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Return how each layer is written, by path, as a ``config.json`` says it."""
        raise NotImplementedError

    def group_bits(self, width: int, dtype: torch.dtype) -> int:
        """Return what a group of columns takes in a row beside its codes: its scale, and its zero or bias.

        Args:
            width: Bits a code.
            dtype: Type of the model.
        """
        raise NotImplementedError

    def expected_bytes(self, winner: Winner) -> int:
        """Return the bytes of all tensors in this format, whose zeros may take more than the budget counts."""
        dtype = winner.evaluator.anatomy.dtype
        with winner.in_place():
            fixed = sum(value.nbytes for value in winner.others().values())
            stored = [winner.stored(index) for _, index in winner.layers().values()]
        bits = 0
        for level in stored:
            if level.format == plain.__name__:
                bits += 8 * sum(value.nbytes for value in level.tensors().values())
                continue
            rows, columns, width, group = (int(level.meta[key]) for key in ("rows", "columns", "width", "group"))
            groups = rows * columns // group
            bits += rows * columns * width + groups * self.group_bits(width, dtype) + columns * self.column_bits
        return fixed + bits // 8

    def _readme(self, winner: Winner, loaded: LoadedModel) -> str:
        text = f"{super()._readme(winner, loaded)}\nIts engine loads it with\n\n```python\n{self.engine_loading}\n```\n"
        more = self.expected_bytes(winner) / winner.packed_bytes - 1
        return f"{text}\n{_size_note(more)}" if more > CLOSE else text

    def write(self, winner: Winner, loaded: LoadedModel, folder: Path) -> None:
        """Write ``model.safetensors`` and the config with its quantization.

        Args:
            winner: The allocation.
            loaded: The dense model.
            folder: An empty folder.
        """
        model: Any = loaded.model
        with winner.in_place():
            tensors = winner.others()
            shapes: dict[str, Shape] = {}
            for path, (_, index) in winner.layers().items():
                written, shape = self._written(winner, index)
                tensors |= {f"{path}.{name}": value for name, value in written.items()}
                shapes |= {path: shape} if shape else {}
            values = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(values, folder / TENSORS, metadata={"format": self.metadata})
            linear = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
            whole = [path for path in linear if path not in shapes]
            config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
            own = self.config_of(shapes, whole, winner.evaluator.anatomy.block_path) | self.engine_config(config)
            if self.half_only and winner.evaluator.anatomy.dtype is torch.float32:
                own["dtype"] = "float16"
            write_json(folder / CONFIG, {**config, **own})
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

    def _written(self, winner: Winner, index: int) -> tuple[Tensors, Shape | None]:
        """Return the tensors of the level that a unit has, and its shape; none where it is the layer as it is."""
        stored = winner.stored(index)
        if stored.format == plain.__name__:
            return stored.tensors(), None
        layer = IntegerLayer.of(stored)
        return self.tensors_of(layer, winner.evaluator.anatomy.dtype), Shape(layer.width, layer.group, layer.symmetric)

    def reload(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model through ``load``."""
        return self.load(folder, dtype=dtype)

    def load(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
        """Return an exported model, read without its engine and dequantized, in eval mode.

        Args:
            folder: A folder that this exporter wrote.
            dtype: Type of the weights; None is the one that the model had.
        """
        folder = Path(folder)
        shapes = self.shapes_of(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        for key in ("quantization", "quantization_config"):
            if hasattr(config, key):
                delattr(config, key)
        tensors = load_file(folder / TENSORS)
        own = next(value.dtype for name, value in tensors.items() if name.rpartition(".")[0] not in shapes)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or own, trust_remote_code=False)
        _fill(made, tensors, {path: (shape, self) for path, shape in shapes.items()})
        return made.eval()


def commonest(shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape that most layers have; one of 4 bits where there is no layer."""
    found = Counter(shapes.values()).most_common(1)
    return found[0][0] if found else Shape(4, 128, symmetric=True)


def _size_note(more: float) -> str:
    """Return what a README says where the files are larger than what the budget counted, by a share of that."""
    return (
        f"The weights take {more:.1%} more than the budget counted: this format keeps more a group of columns. "
        "`compressor.group_bits` counts it.\n"
    )


def _fill(model: Any, tensors: Tensors, layers: Mapping[str, tuple[Shape, IntegerExporter]]) -> None:
    """Copy a checkpoint's tensors into a model, those of integer layers dequantized.

    Args:
        model: Of the checkpoint's config.
        tensors: All of the checkpoint.
        layers: Shape and format of each integer layer, by path.
    """
    state = model.state_dict()
    with torch.no_grad():
        for path, (shape, exporter) in layers.items():
            prefix = f"{path}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            slot_at(model, path).write(exporter.weight_of(own, shape))
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if name in state and not (owner in layers and leaf == "weight"):
                state[name].copy_(value)
