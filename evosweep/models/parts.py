"""What can be dropped from a decoder: attention and MLP sub-blocks, blocks, runs of blocks. Found from the modules."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from evosweep.core.checks import check_choice
from evosweep.models.anatomy import Anatomy, Site

GRANULARITIES = ("sublayers", "blocks", "pairs")


@dataclass(frozen=True)
class Part:
    """Something that can be left out, the residual stream passing by.

    Attributes:
        name: Path in the model; ``model.layers.4+5`` for two blocks.
        blocks: The decoder blocks that it is, or that hold it.
        whole: Whether it is all of its blocks.
        writer: The linear layer whose output joins the residual stream; without that output a sub-block is gone.
            None for whole blocks.
        sites: Names of the linear layers in it.
        parameters: All its parameters.
    """

    name: str
    blocks: tuple[int, ...]
    whole: bool
    writer: Site | None
    sites: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


def parts_of(anatomy: Anatomy, granularity: str) -> tuple[Part, ...]:
    """Return what a granularity allows to drop, in the order in which it runs.

    A sub-block is a child of the block with linear layers in it; linear layers that are the block's own children (as
    OPT's MLP) make up one sub-block together.

    Args:
        anatomy: The model.
        granularity: ``sublayers``, ``blocks``, or ``pairs`` of consecutive blocks (a last odd one stays alone).

    Raises:
        SettingError: Unknown granularity.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    blocks = range(len(anatomy.blocks))
    if granularity == "sublayers":
        return tuple(part for block in blocks for part in _sublayers(anatomy, block))
    step = 2 if granularity == "pairs" else 1
    return tuple(_whole(anatomy, tuple(blocks[start : start + step])) for start in blocks[::step])


def _whole(anatomy: Anatomy, blocks: Sequence[int]) -> Part:
    sites = tuple(site.name for block in blocks for site in anatomy.sites_of(block))
    parameters = tuple(parameter for block in blocks for parameter in anatomy.blocks[block].parameters())
    return Part(f"{anatomy.block_path}.{'+'.join(map(str, blocks))}", tuple(blocks), True, None, sites, parameters)


def _sublayers(anatomy: Anatomy, block: int) -> list[Part]:
    path = f"{anatomy.block_path}.{block}"
    groups: dict[str, list[Site]] = {}
    for site in anatomy.sites_of(block):
        child, _, deeper = site.name.removeprefix(path + ".").partition(".")
        groups.setdefault(child if deeper else "", []).append(site)
    parts = []
    for child, sites in groups.items():
        modules = [anatomy.model.get_submodule(f"{path}.{child}")] if child else [site.module for site in sites]
        name = child or "+".join(site.name.rpartition(".")[2] for site in sites)
        parameters = tuple(parameter for module in modules for parameter in module.parameters())
        names = tuple(site.name for site in sites)
        parts.append(Part(f"{path}.{name}", (block,), False, sites[-1], names, parameters))
    return parts
