"""Find the level store of a model, data and compressor, or build it, block by block."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch.nn import functional

from evosweep.assets.cache import cache_folder
from evosweep.compressors.base import Compressor, LevelPlan, Payload
from evosweep.core.checks import check_choice, check_int, check_number
from evosweep.core.errors import StoreError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest, new_folder, sha256_file, write_json
from evosweep.core.problem import Level, Unit
from evosweep.data.tokens import TokenSplit
from evosweep.models.anatomy import Anatomy, Site
from evosweep.models.load import weights_hash
from evosweep.models.patch import replaced_weights
from evosweep.store.manifest import MANIFEST, SCHEMA, LevelStore, tensor_name

OUTLIER_MULTIPLES = (3, 5, 7, 10)
GRAM_COLUMNS = {"cpu": 192}  # so many columns of the (symmetric) Gram matrix at a time, down to the diagonal


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
        model_name: str,
        progress: Progress | None = None,
    ) -> LevelStore:
        """Return the store, found by its content address or built.

        Raises:
            StoreError: It cannot be built; nothing half-built is left then.
        """
        progress = progress or Silent()
        identity = {
            "schema": SCHEMA,
            "model": weights_hash(anatomy.model),
            "calibration": calibration.hash,
            "compressor": {"kind": f"{type(compressor).__module__}.{type(compressor).__qualname__}",
                           **compressor.describe()},
            "propagate": self.propagate,
            "token_weighting": self.token_weighting,
        }
        key = digest(identity)
        target = cache_folder("stores") / key
        with FileLock(target.with_suffix(".lock")):
            found = _reopen(target, progress)
            if found is not None:
                progress.say(f"level store {key} found, {found.size / 1e6:.0f} MB")
                return found
            with new_folder(target) as folder:
                facts = {"key": key, "model_name": model_name, "calibration_tokens": calibration.tokens,
                         "calibration_documents": list(calibration.documents), "fixed_bits": fixed_bits(anatomy)}
                units = self._build(anatomy, compressor, calibration, folder, progress)
                files = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
                write_json(folder / MANIFEST, {**identity, **facts, "files": files, "units": units})
            built = LevelStore(target)
        progress.say(f"level store {key} built, {built.size / 1e6:.0f} MB")
        return built

    @torch.no_grad()
    def _build(
        self, anatomy: Anatomy, compressor: Compressor, calibration: TokenSplit, folder: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        tokens = torch.from_numpy(calibration.windows).to(anatomy.device)
        hidden = [anatomy.embed(batch) for batch in tokens.split(max(1, self.batch_tokens // calibration.seq_len))]
        plans = compressor.plan(shapes_of(anatomy))
        rows: list[dict[str, Any]] = []
        for block in progress.track(range(len(anatomy.blocks)), description="building level store"):
            sites = anatomy.sites_of(block)
            moments = _moments(anatomy, block, hidden, self.token_weighting)
            ratios = outlier_ratios({site.name: (site.weight, moments[site.group].square) for site in sites})
            tensors: dict[str, torch.Tensor] = {}
            passed_on: dict[str, torch.Tensor] = {}
            for members in _by_group(sites):
                gram = moments[members[0].group].gram
                payloads = compressor.compress({site.name: site.weight.float() for site in members}, gram, plans)
                for site in members:
                    rows.append(_row(site, plans[site.name], payloads[site.name], gram, ratios[site.name]))
                    tensors.update(_tensors(site.name, payloads[site.name]))
                    passed_on[site.name] = self._passed_on(site, plans[site.name], payloads[site.name])
            save_file(tensors, folder / _file(block))
            with replaced_weights(sites, passed_on):
                hidden = [anatomy.run_block(block, batch) for batch in hidden]
        order = {site.name: place for place, site in enumerate(anatomy.sites)}
        return sorted(rows, key=lambda row: order[row["name"]])

    def _passed_on(
        self, site: Site, plans: Sequence[LevelPlan], payloads: Mapping[str, Payload]
    ) -> torch.Tensor:
        if self.propagate is None:
            return site.weight.clone()
        nearest = min(plans, key=lambda plan: abs(plan.value - float(self.propagate or 0)))
        return payloads[nearest.name].weight


def plan_units(anatomy: Anatomy, compressor: Compressor) -> tuple[Unit, ...]:
    """Return the units with all that follows from shapes alone, so that a budget can be checked before any work.

    Raises:
        SettingError: A compressor setting does not fit a layer.
    """
    plans = compressor.plan(shapes_of(anatomy))
    return tuple(
        Unit(
            name=site.name,
            numel=site.shape[0] * site.shape[1],
            block=site.block,
            levels=tuple(Level(name=p.name, cost=p.cost, value=p.value) for p in plans[site.name]),
        )
        for site in anatomy.sites
    )


def shapes_of(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every unit by name."""
    return {site.name: site.shape for site in anatomy.sites}


def fixed_bits(anatomy: Anatomy) -> int:
    """Return the bits of all parameters that are no unit's weight, tied ones once, at their own width."""
    units = {id(site.module.weight) for site in anatomy.sites}
    return sum(
        parameter.numel() * parameter.element_size() * 8
        for parameter in anatomy.model.parameters()
        if id(parameter) not in units
    )


def layer_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return the mean over inputs x of w·‖D x‖², D = ``difference`` (out, in), from ``gram`` = mean of w·x xᵀ."""
    return max(0.0, float(((difference @ gram) * difference).sum(dtype=torch.float64)))


def outlier_ratios(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Return each layer's share of outlier weights, for several multiples M.

    A weight is an outlier if |W_ij|·‖X_j‖₂ is above M times the mean over the whole block, so that the
    numel-weighted mean over a block's layers is OWL's D_b (arXiv 2310.05175, section 4).

    Args:
        layers: Name -> (weight (out, in), mean square of each input (in,)) of all linear layers of one block.
    """
    scores = {name: weight.float().abs() * square.sqrt() for name, (weight, square) in layers.items()}
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / sum(
        score.numel() for score in scores.values()
    )
    return {
        name: {
            f"outlier_ratio_m{multiple}": float((score > multiple * mean).float().mean())
            for multiple in OUTLIER_MULTIPLES
        }
        for name, score in scores.items()
    }


def _reopen(target: Path, progress: Progress) -> LevelStore | None:
    if not target.is_dir():
        return None
    try:
        return LevelStore(target)
    except StoreError as error:
        progress.say(f"{error}; building it anew")
        shutil.rmtree(target)
        return None


@dataclass
class Moments:
    """What calibration remembers of one shared input X: sums while it is filled, then their ``mean()``.

    Attributes:
        gram: w·x xᵀ, shape (in, in); the second moment that compressors see. While it is filled, only what stands
            on and above the diagonal counts.
        square: x_j², shape (in,); what OWL's ‖X_j‖₂ is made of.
        tokens: Tokens seen.
    """

    gram: torch.Tensor
    square: torch.Tensor
    tokens: int = 0

    def add(self, inputs: torch.Tensor, *, weighting: str) -> None:
        """Count inputs of shape (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.square += rows.square().sum(dim=0)
        self.tokens += len(rows)
        if weighting == "relative":
            rows = functional.normalize(rows, dim=1)
        for start in range(0, width := rows.shape[1], step := GRAM_COLUMNS.get(rows.device.type, width)):
            columns = slice(start, min(start + step, width))
            self.gram[: columns.stop, columns].addmm_(rows[:, : columns.stop].T, rows[:, columns])

    def mean(self) -> "Moments":
        """Return the means, the Gram matrix whole."""
        gram = (self.gram.triu() + self.gram.triu(1).T) / self.tokens
        return Moments(gram, self.square / self.tokens, self.tokens)


def _moments(anatomy: Anatomy, block: int, hidden: Sequence[torch.Tensor], weighting: str) -> dict[str, Moments]:
    """Return the moments of each shared input of a block, by group name."""
    found: dict[str, Moments] = {}

    def hook(group: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        width, device = args[0].shape[-1], args[0].device
        empty = Moments(torch.zeros((width, width), device=device), torch.zeros(width, device=device))
        found.setdefault(group, empty).add(args[0], weighting=weighting)

    leaders = [site for site in anatomy.sites_of(block) if site.group == site.name]
    handles = [site.module.register_forward_pre_hook(partial(hook, site.group)) for site in leaders]
    try:
        for batch in hidden:
            anatomy.run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {group: moments.mean() for group, moments in found.items()}


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
    return {"name": site.name, "block": site.block, "shape": list(site.shape), "group": site.group,
            "file": _file(site.block), "columns": ratios, "levels": levels}


def _tensors(unit: str, payloads: Mapping[str, Payload]) -> dict[str, torch.Tensor]:
    return {
        tensor_name(unit, level, part): tensor.cpu().contiguous()
        for level, payload in payloads.items()
        for part, tensor in payload.parts.items()
    }


def _file(block: int) -> str:
    return f"block_{block:03d}.safetensors"
