"""A model without some of its blocks: its list of blocks, its config, and whether transformers builds that again.

A config says what each block is in several ways: lists with an entry a block, lists of block indices, how many of the
first or last blocks are special, tables by index, or periods. All but periods can follow when blocks go. Whether they
did is tried before a search, on a sketch of the smaller model without memory for its weights (``rehearse``).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import nn

from evosweep.models.verify import first_line

NOT_BY_BLOCK = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # lists, whatever their length
INDICES = (
    *("moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"),
    *("cross_attention_layers", "ple_layer_ids"),
)
"""Fields that are lists of block indices."""
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Fields that count blocks from the first."""
LAST = ("num_kv_shared_layers",)
"""Fields that count blocks from the last."""
LAST_INDEX = ("moe_layer_end_index",)
"""Fields that are the index of the last block of a kind."""
COUNTS = ("decoder_layers", "num_decoder_layers")
"""Fields that are the number of blocks, where another one has that meaning by transformers' map of names."""
ROOT_OF_COUNT = ("scale_depth",)
"""Fields that the model divides by the square root of the number of blocks."""
OWN = (
    "layer_idx",
    "layer_id",
    "layer_index",
    "layer_number",
    "block_idx",
    "training",
)  # of modules; numbers change anyhow
SIMPLE = (bool, int, float, str, type(None))


class Blocks(Protocol):
    """A model with its blocks; anatomy.Anatomy is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def block_path(self) -> str: ...


@contextmanager
def without_blocks(anatomy: Blocks, gone: Collection[int]) -> Iterator[None]:
    """Take whole blocks out of the model and its config while the context lasts; the others are numbered anew."""
    if not gone:
        yield
        return
    model: Any = anatomy.model
    config = model.config.get_text_config()
    count = len(anatomy.blocks)
    kept = [index for index in range(count) if index not in gone]
    parent, _, name = anatomy.block_path.rpartition(".")
    around = model.get_submodule(parent)
    tables = config.to_dict()["per_layer_config"] if getattr(config, "is_heterogeneous", False) else None
    changes = _changes(config, kept, count)
    before = {key: vars(config)[key] for key in changes}
    setattr(around, name, nn.ModuleList([anatomy.blocks[index] for index in kept]))
    try:
        _set(config, {"num_hidden_layers": len(kept), **changes}, None if tables is None else _renumbered(tables, kept))
        yield
    finally:
        setattr(around, name, anatomy.blocks)
        _set(config, {"num_hidden_layers": count, **before}, tables)


def rehearse(anatomy: Blocks, gone: Collection[int]) -> str:
    """Return why transformers would not build the model without some blocks again, nothing where it would.

    A sketch without memory is built from the config as it would be saved; its parameters must have the names and shapes
    of the model's, and its blocks the same settings (numbers, texts, switches) as the blocks that stay.

    Args:
        anatomy: The model.
        gone: Indices of the blocks that are dropped.
    """
    model: Any = anatomy.model
    try:
        with without_blocks(anatomy, gone):
            with TemporaryDirectory() as folder, torch.device("meta"):
                model.config.save_pretrained(folder)
                sketch = type(model)(type(model.config).from_pretrained(folder)).eval()
            return _difference(model, sketch, anatomy.block_path)
    except Exception as error:  # whatever a config or a model's own code raises
        return f"transformers does not build it: {first_line(error)}"


def _difference(model: nn.Module, sketch: nn.Module, path: str) -> str:
    """Return how a sketch differs from a model, nothing where it does not."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in sketch.state_dict().items()}
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            return (
                f"{name} has shape {_shape(shapes.get(name))}, and {_shape(others.get(name))} where it is loaded again"
            )
    ours = dict(model.get_submodule(path).named_modules())
    for name, module in sketch.get_submodule(path).named_modules():
        for key, value in _settings(module).items():
            mine = _settings(ours[name]).get(key, value)
            if not _equal(mine, value):
                return f"{path}.{name}.{key} is {mine}, and {value} where it is loaded again"
    return ""


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-9)
    return bool(value == other)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain values among a module's attributes, and those in lists."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in OWN
        and not key.startswith("_")
        and (
            isinstance(value, SIMPLE) or (isinstance(value, list | tuple) and all(isinstance(v, SIMPLE) for v in value))
        )
    }


def _changes(config: Any, kept: Sequence[int], count: int) -> dict[str, Any]:
    """Return the fields of a config that follow the blocks, with their new values.

    Args:
        config: Of the text model.
        kept: Indices of the blocks that stay.
        count: Number of all blocks.
    """
    rules: Mapping[tuple[str, ...], Callable[[Any], Any]] = {
        INDICES: lambda value: [kept.index(index) for index in value if index in kept],
        FIRST: lambda value: sum(index < value for index in kept),
        LAST: lambda value: sum(index >= count - value for index in kept),
        COUNTS: lambda value: len(kept) if value == count else value,
        LAST_INDEX: lambda value: sum(index <= value % count for index in kept) - 1,
        ROOT_OF_COUNT: lambda value: value * math.sqrt(len(kept) / count),
    }
    by_name = {name: rule for names, rule in rules.items() for name in names}
    found = {}
    for key, value in vars(config).items():
        if key in by_name:
            if value is not None:
                found[key] = by_name[key](value)
        elif isinstance(value, list) and len(value) == count and key not in NOT_BY_BLOCK:
            found[key] = [value[index] for index in kept]
    return found


def _renumbered(tables: Mapping[str, Any], kept: Sequence[int]) -> dict[int, Any]:
    """Return a table by block index for the blocks that stay."""
    return {kept.index(int(index)): value for index, value in tables.items() if int(index) in kept}


def _set(config: Any, values: Mapping[str, Any], tables: Mapping[Any, Any] | None) -> None:
    """Set fields of a config.

    Args:
        config: The config.
        values: By name.
        tables: What single blocks have otherwise, by their index; None where the config has no such table.
    """
    if tables is not None:
        config.per_layer_config = None
    for key, value in values.items():
        setattr(config, key, value)
    if tables is not None:
        config.per_layer_config = tables
