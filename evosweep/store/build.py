"""Find the level store of a model, data and compressor, or build it, block by block."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from evosweep.assets.cache import cache_folder
from evosweep.compressors.base import Compressor, LevelPlan, Payload, Plans
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError, StoreError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest, new_folder, sha256_file, write_json
from evosweep.core.problem import Unit
from evosweep.data.tokens import TokenSplit
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.load import weights_hash
from evosweep.models.patch import replaced_weights
from evosweep.store import shard
from evosweep.store.drop import Drop
from evosweep.store.manifest import MANIFEST, SCHEMA, LevelStore, tensor_name, unit_of
from evosweep.store.moments import layer_error, moments_of, outlier_ratios

DISK_MARGIN = 1.05


class StoreBuilder:
    """How a store is built.

    Args:
        propagate: Nominal number of the level (the nearest there is) through whose output the following blocks
            are calibrated; null calibrates every block on the dense model's activations.
        token_weighting: ``relative`` divides each token's x xᵀ by ‖x‖², so that every token's relative error counts
            alike, as it does in the fitness; ``plain`` is the papers' XXᵀ. Attention sinks and massive activations
            are why it matters: the few tokens that all others attend to have inputs of tiny or huge norm, and XXᵀ
            all but ignores or all but only sees them.
        batch_tokens: Calibration tokens that run through a block at once.
    """

    def __init__(
        self, *, propagate: float | None = 3, token_weighting: str = "relative", batch_tokens: int = 4096
    ) -> None:
        self.token_weighting = check_choice("store.token_weighting", token_weighting, ("relative", "plain"))
        self.propagate = None if propagate is None else check_number("store.propagate", propagate)
        self.batch_tokens = check_int("store.batch_tokens", batch_tokens, low=1)

    def open(
        self,
        anatomy: Anatomy,
        compressor: Compressor,
        calibration: TokenSplit,
        *,
        drop: Drop | None = None,
        model_name: str,
        progress: Progress | None = None,
    ) -> LevelStore:
        """Return the store, found by its content address or built.

        Raises:
            StoreError: It cannot be built; nothing half-built is left then.
        """
        progress, drop = progress or Silent(), drop or Drop()
        identity = {
            "schema": SCHEMA,
            "model": weights_hash(anatomy.model),
            "calibration": calibration.hash,
            "compressor": {"kind": f"{type(compressor).__module__}.{type(compressor).__qualname__}",
                           **compressor.describe()},
            "drop": drop.describe(),
            "propagate": self.propagate,
            "token_weighting": self.token_weighting,
        }
        key = digest(identity)
        target = cache_folder("stores") / key
        with FileLock(target.with_suffix(".lock")) if shard.leads() else nullcontext():
            found = _reopen(target, progress) if shard.leads() else None
            if shard.agree(leader=found is not None):
                found = found or LevelStore(target)
                progress.say(f"level store {key} found, {found.size / 1e6:.0f} MB")
                return found
            _check_room(plan_units(anatomy, compressor, drop), target.parent)
            with new_folder(target) if shard.leads() else TemporaryDirectory() as name:
                folder = Path(name)
                facts = {"key": key, "model_name": model_name, "calibration_tokens": calibration.tokens,
                         "calibration_documents": list(calibration.documents),
                         "fixed_bits": fixed_bits(anatomy, compressor, drop)}
                units = self._build(anatomy, compressor, drop, calibration, folder, progress)
                files = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
                write_json(folder / MANIFEST, {**identity, **facts, "files": files, "units": units})
            shard.agree(leader=True)  # only now is it where the others look
            built = LevelStore(target)
        progress.say(f"level store {key} built, {built.size / 1e6:.0f} MB")
        return built

    @torch.no_grad()
    def _build(
        self,
        anatomy: Anatomy,
        compressor: Compressor,
        drop: Drop,
        calibration: TokenSplit,
        folder: Path,
        progress: Progress,
    ) -> list[dict[str, Any]]:
        tokens = torch.from_numpy(shard.mine(calibration.windows)).to(anatomy.device)
        hidden = [anatomy.embed(batch) for batch in tokens.split(max(1, self.batch_tokens // calibration.seq_len))]
        plans = compressor.plan(shapes_of(anatomy))
        parts = drop.parts(anatomy)
        rows: list[dict[str, Any]] = []
        for block in progress.track(range(len(anatomy.blocks)), description="building level store"):
            rows += drop.rows(anatomy, [part for part in parts if part.blocks[0] == block], plans, hidden)
            rows += self._compress(anatomy, block, compressor, plans, hidden, folder)
        order = {site.name: place for place, site in enumerate(anatomy.sites)}
        return sorted(rows, key=lambda row: order[row["first"]])

    def _compress(
        self,
        anatomy: Anatomy,
        block: int,
        compressor: Compressor,
        plans: Plans,
        hidden: list[torch.Tensor],
        folder: Path,
    ) -> list[dict[str, Any]]:
        """Write the payloads of one block; pass its hidden states on, in place, through the compressed block."""
        rows: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        passed_on: dict[str, torch.Tensor] = {}
        sites = [site for site in anatomy.sites_of(block) if site.name in plans]
        if sites:
            moments = moments_of(anatomy, block, hidden, self.token_weighting)
            for group, moment in moments.items():
                if not bool(moment.gram.isfinite().all()):
                    raise StoreError(f"the calibration inputs of {group} hold NaN or Inf")
            ratios = outlier_ratios({site.name: (site.weight, moments[site.group].square) for site in sites})
        for members in _by_group(sites):
            gram = moments[members[0].group].gram
            try:
                payloads = compressor.compress({site.name: site.weight.float() for site in members}, gram, plans)
            except StoreError as error:
                raise StoreError(f"{members[0].name}: {error}") from error
            for site in members:
                rows.append(_row(site, plans[site.name], payloads[site.name], gram, ratios[site.name]))
                tensors.update(_tensors(site.name, payloads[site.name]))
                passed_on[site.name] = self._passed_on(site, plans[site.name], payloads[site.name])
        if tensors and shard.leads():
            save_file(tensors, folder / _file(block))
        with replaced_weights(sites, passed_on):
            hidden[:] = [anatomy.run_block(block, batch) for batch in hidden]
        return rows

    def _passed_on(
        self, site: Site, plans: Sequence[LevelPlan], payloads: Mapping[str, Payload]
    ) -> torch.Tensor:
        if self.propagate is None:
            return site.weight.clone()
        nearest = min(plans, key=lambda plan: abs(plan.value - float(self.propagate or 0)))
        return payloads[nearest.name].weight


def plan_units(anatomy: Anatomy, compressor: Compressor, drop: Drop | None = None) -> tuple[Unit, ...]:
    """Return the units with all that follows from shapes alone, so that a budget can be checked before any work.

    Raises:
        SettingError: A setting does not fit a layer, or nothing is left to choose.
    """
    drop = drop or Drop()
    plans = compressor.plan(shapes_of(anatomy))
    rows = drop.rows(anatomy, drop.parts(anatomy), plans, hidden=None)
    rows += [_planned(site, plans[site.name]) for site in anatomy.sites if site.name in plans]
    if not rows:
        raise SettingError("compressor", allowed="something else than none where drop=none too", got="none")
    order = {site.name: place for place, site in enumerate(anatomy.sites)}
    return tuple(unit_of(row) for row in sorted(rows, key=lambda row: order[row["first"]]))


def shapes_of(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every unit by name."""
    return {site.name: site.shape for site in anatomy.sites}


def fixed_bits(anatomy: Anatomy, compressor: Compressor, drop: Drop | None = None) -> int:
    """Return the bits of all parameters that belong to no unit, tied ones once, at their own width."""
    drop = drop or Drop()
    plans = compressor.plan(shapes_of(anatomy))
    units = {id(site.module.weight) for site in anatomy.sites if site.name in plans}
    units |= {id(parameter) for part in drop.parts(anatomy) for parameter in part.parameters}
    return sum(
        parameter.numel() * parameter.element_size() * 8
        for parameter in anatomy.model.parameters()
        if id(parameter) not in units
    )


def _check_room(units: Sequence[Unit], folder: Path) -> None:
    needed = sum(level.cost for unit in units for level in unit.levels) // 8
    free = shutil.disk_usage(folder).free
    if free < DISK_MARGIN * needed:
        raise StoreError(
            f"the level store needs about {needed / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB are free; "
            "make room, or set EVOSWEEP_CACHE to another disk"
        )


def _reopen(target: Path, progress: Progress) -> LevelStore | None:
    if not target.is_dir():
        return None
    try:
        return LevelStore(target)
    except StoreError as error:
        progress.say(f"{error}; building it anew")
        shutil.rmtree(target)
        return None


def _by_group(sites: Sequence[Site]) -> list[list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return list(groups.values())


def _row(
    site: Site,
    plans: Sequence[LevelPlan],
    payloads: Mapping[str, Payload],
    gram: torch.Tensor,
    ratios: dict[str, float],
) -> dict[str, Any]:
    weight = site.weight.float()
    whole = layer_error(weight, gram)
    levels = []
    for plan in plans:
        payload = payloads[plan.name]
        error = layer_error(weight - payload.weight, gram)
        levels.append(
            {"name": plan.name, "cost": plan.cost, "value": plan.value, "error": error,
             "relative_error": error / whole if whole else 0.0, "format": payload.format,
             "meta": dict(payload.meta), "parts": sorted(payload.parts)}
        )
    return {**_planned(site, plans), "file": _file(site.block), "columns": ratios, "levels": levels}


def _planned(site: Site, plans: Sequence[LevelPlan]) -> dict[str, Any]:
    """Return what is known of a layer before it is compressed."""
    levels = [{"name": plan.name, "cost": plan.cost, "value": plan.value} for plan in plans]
    return {"name": site.name, "first": site.name, "block": site.block, "shape": list(site.shape),
            "numel": site.shape[0] * site.shape[1], "group": site.group, "levels": levels}


def _tensors(unit: str, payloads: Mapping[str, Payload]) -> dict[str, torch.Tensor]:
    return {
        tensor_name(unit, level, part): tensor.cpu().contiguous()
        for level, payload in payloads.items()
        for part, tensor in payload.parts.items()
    }


def _file(block: int) -> str:
    return f"block_{block:03d}.safetensors"
