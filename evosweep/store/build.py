"""Find the level store of a model, data and compressor, or build it, block by block."""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from evosweep.assets.cache import cache_folder
from evosweep.compressors.base import Compressor, LevelPlan, Payload, Plans, identity, layer_error
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import SettingError, StoreError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest, new_folder, sha256_file, write_json
from evosweep.core.unit import Unit
from evosweep.data.tokens import TokenSplit
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.device import free_bytes
from evosweep.models.dropping import Drop
from evosweep.models.load import weights_hash
from evosweep.models.patch import replaced_weights
from evosweep.store import shard
from evosweep.store.manifest import MANIFEST, SCHEMA, LevelStore, tensor_name, unit_of
from evosweep.store.moments import moments_of, outlier_ratios

DISK_MARGIN = 1.05
HIDDEN_SHARE, BATCH_SHARE = 0.4, 0.3  # of free memory
MOST_AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens; more makes nothing faster


class StoreBuilder:
    """How a store is built.

    Args:
        propagate: Nominal number of the level (the nearest there is) through whose output the following blocks
            are calibrated; null calibrates every block on the dense model's activations.
        token_weighting: ``relative`` divides each token's x xᵀ by ‖x‖², so that every token's relative error counts
            alike, as it does in the fitness; ``plain`` is the papers' XXᵀ. Attention sinks and massive activations
            are why it matters: the few tokens that all others attend to have inputs of tiny or huge norm, and XXᵀ
            all but ignores or all but only sees them.
        batch_tokens: Calibration tokens that run through a block at once; null: as many as free memory allows.
    """

    def __init__(
        self, *, propagate: float | None = 3, token_weighting: str = "relative", batch_tokens: int | None = None
    ) -> None:
        self.token_weighting = check_choice("token_weighting", token_weighting, ("relative", "plain"))
        self.propagate = None if propagate is None else check_number("propagate", propagate)
        self.batch_tokens = None if batch_tokens is None else check_int("batch_tokens", batch_tokens, low=1)

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
        address = {
            "schema": SCHEMA,
            "model": weights_hash(anatomy.model),
            "calibration": calibration.hash,
            "compressor": identity(compressor),
            "drop": drop.describe(),
            "propagate": self.propagate,
            "token_weighting": self.token_weighting,
        }
        key = digest(address)
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
                facts = {
                    "key": key,
                    "model_name": model_name,
                    "calibration_tokens": calibration.tokens,
                    "calibration_documents": list(calibration.documents),
                    "fixed_bits": fixed_bits(anatomy, compressor, drop),
                }
                units = self._build(anatomy, compressor, drop, calibration, folder, progress)
                files = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
                write_json(folder / MANIFEST, {**address, **facts, "files": files, "units": units})
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
        room = rooms(anatomy, tokens.numel())
        if room.home != anatomy.device:
            progress.say("calibration activations stay in host memory: the device has no room for them")
        at_once = max(1, (self.batch_tokens or room.batch_tokens) // calibration.seq_len)
        hidden = [anatomy.embed(batch).to(room.home) for batch in tokens.split(at_once)]
        plans = compressor.plan(shapes_of(anatomy))
        options = drop.options(anatomy)
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(1) as behind:  # writes a block while the next one is at work
            written = []
            for block in progress.track(range(len(anatomy.blocks)), description="building level store"):
                here = [option for option in options if option.blocks[0] == block]
                rows += drop.rows(anatomy, here, plans, hidden, add_up=shard.add_up)
                made, tensors = self._compress(anatomy, block, compressor, plans, hidden)
                rows += made
                if tensors and shard.leads():
                    written.append(behind.submit(_write, tensors, folder / _file(block)))
                for waiting in written[:-1]:
                    waiting.result()  # one block's payloads wait at most; and a full disk is heard of here
            for waiting in written:
                waiting.result()
        order = {site.name: place for place, site in enumerate(anatomy.sites)}
        return sorted(rows, key=lambda row: order[row["first"]])

    def _compress(
        self,
        anatomy: Anatomy,
        block: int,
        compressor: Compressor,
        plans: Plans,
        hidden: list[torch.Tensor],
    ) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """Return rows and payloads of one block; pass its hidden states on, in place, through the compressed block."""
        rows: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        passed_on: dict[str, torch.Tensor] = {}
        sites = [site for site in anatomy.sites_of(block) if site.name in plans]
        if sites:
            moments = moments_of(anatomy, block, hidden, self.token_weighting)
            for group, moment in moments.items():
                if not bool(moment.gram.isfinite().all()):
                    raise StoreError(f"the calibration inputs of {group} hold NaN or Inf")
            dense = {site.name: site.weight.to(anatomy.device).float() for site in sites}
            ratios = outlier_ratios({site.name: (dense[site.name], moments[site.group].square) for site in sites})
        for members in _by_group(sites):
            gram = moments[members[0].group].gram
            try:
                payloads = compressor.compress({site.name: dense[site.name] for site in members}, gram, plans)
            except StoreError as error:
                raise StoreError(f"{members[0].name}: {error}") from error
            for site in members:
                columns = ratios[site.name]
                rows.append(_row(site, dense[site.name], plans[site.name], payloads[site.name], gram, columns))
                tensors.update(_tensors(site.name, payloads[site.name]))
                passed_on[site.name] = self._passed_on(site, plans[site.name], payloads[site.name])
        with replaced_weights(sites, passed_on):
            hidden[:] = [anatomy.run_block(block, batch).to(batch.device) for batch in hidden]
        return rows, tensors

    def _passed_on(self, site: Site, plans: Sequence[LevelPlan], payloads: Mapping[str, Payload]) -> torch.Tensor:
        if self.propagate is None:
            return site.weight.clone()
        made = [plan for plan in plans if plan.name in payloads]
        nearest = min(made, key=lambda plan: abs(plan.nominal.number - float(self.propagate or 0)))
        return payloads[nearest.name].weight


@dataclass(frozen=True)
class Rooms:
    """Where calibration's hidden states are kept between blocks, and how many tokens run at once."""

    home: torch.device
    batch_tokens: int


def rooms(anatomy: Anatomy, tokens: int) -> Rooms:
    """Return what fits the memory that is free now, for so many calibration tokens.

    Hidden states that would take more than ``HIDDEN_SHARE`` of it are kept in host memory. A batch takes, beside its
    hidden states, in every linear layer of the widest block inputs and outputs, and its inputs in fp32 for the Gram
    matrix: no more than ``BATCH_SHARE``.
    """
    free, item = free_bytes(anatomy.device), anatomy.dtype.itemsize
    width = anatomy.head.weight.shape[1]
    wanted = tokens * width * item
    home = torch.device("cpu") if wanted > HIDDEN_SHARE * free else anatomy.device
    left = free if home != anatomy.device else free - wanted
    per_token = max(
        sum((item + 4) * site.shape[1] + item * site.shape[0] for site in anatomy.sites_of(block))
        for block in range(len(anatomy.blocks))
    )
    fitting = max(1, int(BATCH_SHARE * left / per_token))
    return Rooms(home, min(fitting, MOST_AT_ONCE[anatomy.device.type]))


def plan_units(anatomy: Anatomy, compressor: Compressor, drop: Drop | None = None) -> tuple[Unit, ...]:
    """Return the units with all that follows from shapes alone, so that a budget can be checked before any work.

    Raises:
        SettingError: A setting does not fit a layer, or nothing is left to choose.
    """
    drop = drop or Drop()
    plans = compressor.plan(shapes_of(anatomy))
    rows = drop.rows(anatomy, drop.options(anatomy), plans, hidden=None)
    rows += [_planned(site, plans[site.name]) for site in anatomy.sites if site.name in plans]
    if not rows:
        raise SettingError("", owner=compressor, allowed="something else than none where drop=none too", got="none")
    order = {site.name: place for place, site in enumerate(anatomy.sites)}
    return tuple(unit_of(row) for row in sorted(rows, key=lambda row: order[row["first"]]))


def shapes_of(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every unit by name."""
    return {site.name: site.shape for site in anatomy.sites}


def fixed_bits(anatomy: Anatomy, compressor: Compressor, drop: Drop | None = None) -> int:
    """Return the bits of all parameters that belong to no unit, tied ones once, at their own width."""
    drop = drop or Drop()
    plans = compressor.plan(shapes_of(anatomy))
    units = {id(site.parameter) for site in anatomy.sites if site.name in plans}
    units |= {id(parameter) for option in drop.options(anatomy) for parameter in option.parameters}
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
    weight: torch.Tensor,
    plans: Sequence[LevelPlan],
    payloads: Mapping[str, Payload],
    gram: torch.Tensor,
    ratios: dict[str, float],
) -> dict[str, Any]:
    whole = layer_error(weight, gram)
    levels = []
    for plan in plans:
        if plan.name not in payloads:
            continue
        payload = payloads[plan.name]
        error = payload.output_error(weight, gram)
        levels.append(
            {
                **_level(plan, site.shape),
                "error": error,
                "relative_error": error / whole if whole else 0.0,
                "format": payload.format,
                "meta": dict(payload.meta),
                "parts": sorted(payload.parts),
            }
        )
    return {**_planned(site, plans), "file": _file(site.block), "columns": ratios, "levels": levels}


def _planned(site: Site, plans: Sequence[LevelPlan]) -> dict[str, Any]:
    """Return what is known of a layer before it is compressed."""
    levels = [_level(plan, site.shape) for plan in plans]
    return {
        "name": site.name,
        "first": site.name,
        "block": site.block,
        "shape": list(site.shape),
        "numel": site.shape[0] * site.shape[1],
        "group": site.group,
        "levels": levels,
    }


def _level(plan: LevelPlan, shape: tuple[int, int]) -> dict[str, Any]:
    removed = 1 - plan.kept / (shape[0] * shape[1]) if plan.kept else 0.0
    return {"name": plan.name, "cost": plan.cost, "nominal": asdict(plan.nominal), "removed": removed}


def _tensors(unit: str, payloads: Mapping[str, Payload]) -> dict[str, torch.Tensor]:
    return {
        tensor_name(unit, level, part): tensor
        for level, payload in payloads.items()
        for part, tensor in payload.parts.items()
    }


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _file(block: int) -> str:
    return f"block_{block:03d}.safetensors"
