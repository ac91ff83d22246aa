"""Find the level store of a model, text and compressor, or build it."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from evosweep import parallel
from evosweep.assets.cache_folder import cache_folder, not_writable
from evosweep.assets.locks import locked
from evosweep.compressors.base import identity
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import ModelError, SettingError, StoreError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import digest
from evosweep.data.tokens import TokenSplit
from evosweep.models.anatomy import Anatomy
from evosweep.models.attention import attention_received
from evosweep.models.expert_slots import RoutedSlot
from evosweep.models.load import weights_hash
from evosweep.store.calibrate import Calibration, Walk
from evosweep.store.manifest import LevelStore
from evosweep.store.manifest_rows import SCHEMA, Manifest
from evosweep.store.routed import routing_notes
from evosweep.store.store_plan import StorePlan
from evosweep.store.unfinished import UnfinishedStore
from evosweep.store.weighting import WEIGHTINGS

DISK_MARGIN = 1.05
EXPERTS = 1  # raise when the levels of experts change: older stores of mixtures then are not reused
FEW_TOKENS = 8  # that the attention of every block is tried on before any work


class StoreBuilder:
    """Finds or builds level stores.

    Args:
        propagate: Nominal number of the level (the nearest that a layer has) through whose output the following blocks
            are calibrated; null calibrates every block on the dense model's activations.
        token_weighting: ``relative`` divides each token's x xᵀ by ‖x‖², so that the relative error of every token
            counts the same, as in the fitness; ``plain`` is XXᵀ as in the papers. They differ by attention sinks and
            massive activations: a few tokens with inputs of tiny or huge norm, which XXᵀ nearly ignores or which
            outweigh all others in it. ``root`` divides by ‖x‖, ``clipped`` by the square of ‖x‖ or of its window's
            median, whichever is larger. ``attention`` weights x xᵀ by the attention that a token receives in its block
            (RSQ), ``relative_attention`` by both. See ``evosweep.store.weighting``.
        batch_tokens: Calibration tokens that run through a block at once; null: as many as free memory allows.
        layer_errors: Whether every level's layer-output error is measured, which most allocators need. Without it, the
            second moment of inputs is measured only for compressors that need it.
        input_ranges: Whether the largest input of every layer is measured, which static activations need.
        lock_timeout: Seconds to wait while another process builds the same store.
    """

    def __init__(
        self,
        *,
        propagate: float | None = 3,
        token_weighting: str = "relative",
        batch_tokens: int | None = None,
        layer_errors: bool = True,
        input_ranges: bool = False,
        lock_timeout: float = 3600,
    ) -> None:
        self.settings = Calibration(
            propagate=None if propagate is None else check_number("propagate", propagate),
            token_weighting=check_choice("token_weighting", token_weighting, WEIGHTINGS),
            layer_errors=check_bool("layer_errors", layer_errors),
            input_ranges=check_bool("input_ranges", input_ranges),
            batch_tokens=None if batch_tokens is None else check_int("batch_tokens", batch_tokens, low=1),
        )
        self.lock_timeout = check_number("lock_timeout", lock_timeout, low=0)

    def open(
        self, plan: StorePlan, calibration: TokenSplit, *, model_name: str, progress: Progress | None = None
    ) -> LevelStore:
        """Return the store of a plan, found by its content address or built.

        An existing store is read without a lock, so that a read-only cache works if it holds the store.

        Args:
            plan: What ``plan_store`` returned.
            calibration: Token windows.
            model_name: What the user calls the model; recorded, not part of the address.
            progress: Shows what is done.

        Raises:
            StoreError: It cannot be built; nothing half-built is left then. Of a build that is interrupted or killed,
                or whose disk is full, the finished blocks stay, and the next one goes on from them.
        """
        progress = progress or Silent()
        address = self._address(plan, calibration)
        target = cache_folder("stores") / digest(address)
        with _disk_errors_explained(target.parent):
            store = self._found(target)
            verb = "found"
            if store is None:
                store, verb = self._build(target, plan, calibration, address, model_name, progress)
        progress.say(f"level store {store.key} {verb}, {megabytes(store.size)}")
        for note in routing_notes(store.manifest.units, store.manifest.calibration_tokens):
            progress.say(note)
        return store

    def _address(self, plan: StorePlan, calibration: TokenSplit) -> dict[str, Any]:
        """Return everything that decides what is in a store."""
        units = {slot.name for slot in plan.outer.layers(plan.anatomy)}
        shares = sorted({slot.share for slot in plan.anatomy.slots if isinstance(slot, RoutedSlot)})
        as_is = [slot.name for slot in plan.anatomy.slots if slot.name not in units]
        return {
            "schema": SCHEMA,
            "model": weights_hash(plan.anatomy.model),
            "calibration": calibration.hash,
            "compressor": identity(plan.compressor),
            "drop": plan.drop.describe(),
            "propagate": self.settings.propagate,
            "token_weighting": self.settings.token_weighting,
            "layer_errors": self.settings.layer_errors,
            **({"units": plan.outer.describe()} if plan.outer.any else {}),
            **({"experts": EXPERTS, "active_experts": shares} if shares else {}),
            **({"excluded": sorted(plan.excluded)} if plan.excluded else {}),
            **({"as_is": as_is} if as_is else {}),
            **({"input_ranges": True} if self.settings.input_ranges else {}),  # stores without them stay where they are
        }

    @staticmethod
    def _found(target: Path) -> LevelStore | None:
        """Return the store, in every process, if it exists and is undamaged; else None."""
        store = None
        if parallel.is_leader() and target.is_dir():
            try:
                store = LevelStore(target)
            except StoreError:
                store = None
        if parallel.broadcast_bool(store is not None):
            return store or LevelStore(target, verify=False)  # the leader has verified it
        return None

    def _build(
        self,
        target: Path,
        plan: StorePlan,
        calibration: TokenSplit,
        address: Mapping[str, Any],
        model_name: str,
        progress: Progress,
    ) -> tuple[LevelStore, str]:
        """Return the store and whether it was ``built`` here, or ``found``: built by another process meanwhile.

        Args:
            target: Its folder.
            plan: Units and levels.
            calibration: Token windows.
            address: What decides the content.
            model_name: What the user calls the model.
            progress: Shows what is done.
        """
        leader = parallel.is_leader()
        with self._lock(target, progress) if leader else nullcontext():
            found = self._found(target)
            if found is not None:
                return found, "found"
            self._check_weighting(plan)
            self._check_attention(plan.anatomy)
            unfinished = UnfinishedStore(target, address)
            if leader:
                _remove_unusable(target, address, progress)
                unfinished.open(len(plan.anatomy.blocks), progress)
                check_room(plan, target.parent, there=unfinished.size)
            with unfinished.kept() if leader else nullcontext():
                rows = Walk(plan, self.settings, progress, unfinished).run(calibration)
                if leader:
                    manifest = Manifest(
                        schema=SCHEMA,
                        key=target.name,
                        address=address,
                        model_name=model_name,
                        calibration_tokens=calibration.tokens,
                        calibration_documents=tuple(calibration.documents),
                        fixed_bits=plan.fixed_bits,
                        files=dict(sorted(unfinished.files.items())),
                        units=rows,
                    )
                    manifest.write(unfinished.payloads)
                    unfinished.become_store()
            parallel.broadcast_bool(True)  # the other processes wait here until the folder has its name
            return LevelStore(target, verify=False), "built"  # just written and hashed

    def _check_weighting(self, plan: StorePlan) -> None:
        """Raise SettingError if the weighting needs whole windows, of which single experts see some tokens."""
        experts = any(isinstance(slot, RoutedSlot) and slot.name in plan.levels for slot in plan.anatomy.slots)
        if experts and WEIGHTINGS[self.settings.token_weighting].by_window:
            fitting = [name for name, weighting in WEIGHTINGS.items() if not weighting.by_window]
            raise SettingError(
                "token_weighting",
                owner=self,
                allowed=f"one of {', '.join(fitting)} for a mixture, whose experts see some tokens of a window alone",
                got=self.settings.token_weighting,
            )

    @torch.no_grad()
    def _check_attention(self, anatomy: Anatomy) -> None:
        """Raise SettingError if the weighting reads a model's attention and it cannot be read.

        A few tokens are run through all blocks.
        """
        if WEIGHTINGS[self.settings.token_weighting].importance is None:
            return
        tokens = torch.zeros((1, FEW_TOKENS), dtype=torch.long, device=anatomy.device)
        hidden = None if anatomy.whole_because else anatomy.embed(tokens)
        try:
            for block in range(len(anatomy.blocks)):
                attention_received(anatomy, block, hidden, tokens)
                hidden = None if hidden is None else anatomy.run_block(block, hidden, tokens)
        except ModelError as error:
            others = [name for name, weighting in WEIGHTINGS.items() if weighting.importance is None]
            raise SettingError(
                "token_weighting",
                owner=self,
                allowed=f"one of {', '.join(others)} for this model",
                got=self.settings.token_weighting,
                hint=str(error),
            ) from error

    def _lock(self, target: Path, progress: Progress) -> AbstractContextManager[None]:
        """Return the lock that a process holds while it builds a store."""
        return locked(
            target,
            purpose=f"building level store {target.name}",
            timeout=self.lock_timeout,
            progress=progress,
            error=StoreError,
            hint="or raise store.lock_timeout",
        )


def check_room(plan: StorePlan, folder: Path, *, there: int = 0) -> None:
    """Raise StoreError if a disk has no room for a store.

    Args:
        plan: Of the store.
        folder: On the disk.
        there: Bytes of the store that are there already.
    """
    needed = max(0, plan.level_bits // 8 - there)
    free = shutil.disk_usage(folder).free
    if free < DISK_MARGIN * needed:
        raise StoreError(
            f"the level store needs about {megabytes(needed)} in {folder}, where {megabytes(free)} are free; "
            "make room, or set EVOSWEEP_CACHE to another disk"
        )


def megabytes(size: int) -> str:
    """Return a number of bytes in MB, with digits enough that nothing becomes 0 MB."""
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def _remove_unusable(target: Path, address: Mapping[str, Any], progress: Progress) -> None:
    """Remove a store that cannot be used, and say why it is built again.

    Args:
        target: Folder of the store.
        address: Everything that decides what is in it.
        progress: Told the reason.
    """
    if target.is_dir():
        try:
            LevelStore(target)
        except StoreError as error:
            progress.say(f"{error}; building it anew")
            shutil.rmtree(target)
        return
    before = {name: value for name, value in address.items() if name != "layer_errors"}  # schema 4 did not have it
    older = target.parent / digest({**before, "schema": SCHEMA - 1})
    if older.is_dir():
        progress.say(f"level store {older} was made by an older version of evosweep and can be removed; building anew")


@contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    """Raise StoreError, with a message that says what to do, for every error of the disk inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise StoreError(f"the level store was not written: {not_writable(folder, reason)}") from error
