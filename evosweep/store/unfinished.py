"""A level store that is being built: what is finished of it, on disk, from which the next build of the store goes on.

Beside the store's folder ``KEY`` there is ``KEY.partial``: in ``store/`` the files of payloads, and for each finished
part, a block or the statistics of the whole model, a JSON file with their hashes and the block's rows of the manifest.
That file is written last, so a part counts as finished only where everything of it is there. Activations are not
kept: running the finished blocks again takes seconds, where keeping them would write gigabytes a block.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from evosweep.core.errors import StoreError
from evosweep.core.events import Progress
from evosweep.core.files import digest, json_safe, sha256_file, write_json
from evosweep.store.manifest_rows import ManifestUnit
from evosweep.store.payload_files import write_tensors

PAYLOADS = "store"  # folder that becomes the store
SETTINGS = "settings.json"
STATISTICS = "statistics"
Tensors = Mapping[str, torch.Tensor]


@dataclass
class UnfinishedStore:
    """The folder of a store that is being built; the lock of the store is held while it is used.

    Attributes:
        target: Folder that the store will have.
        address: Everything that decides what is in it.
        rows: Rows of the manifest of every finished block, by its index.
        files: SHA-256 of the files of payloads, by name.
    """

    target: Path
    address: Mapping[str, Any]
    rows: dict[int, tuple[ManifestUnit, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Everything about the unfinished store."""
        return self.target.with_suffix(".partial")

    @property
    def payloads(self) -> Path:
        """The files of payloads."""
        return self.folder / PAYLOADS

    @property
    def size(self) -> int:
        """Bytes of the files of payloads so far."""
        return sum((self.payloads / name).stat().st_size for name in self.files)

    def open(self, blocks: int, progress: Progress) -> None:
        """Find what an earlier build of this store has finished, and remove everything else.

        Args:
            blocks: Number of blocks of the model.
            progress: Told what is there, and what is damaged.
        """
        if self.folder.is_dir() and self._settings() is None:
            shutil.rmtree(self.folder)
        damaged = [block for block in range(blocks) if not self.read(block)]
        if self.rows:
            progress.say(
                f"level store {self.target.name} was begun: {len(self.rows)} of {blocks} blocks are there already"
            )
        if damaged:
            numbers = ", ".join(map(str, damaged))
            progress.say(f"what is there of block {numbers} is damaged, and is made again")
        for path in self.payloads.glob("*"):
            if path.name not in self.files:
                path.unlink()

    def begin(self, batch_tokens: int) -> None:
        """Write down how many tokens run at once: sums of a later build that goes on are rounded as here."""
        self.payloads.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS, {"address": self.address, "batch_tokens": batch_tokens})

    @property
    def batch_tokens(self) -> int | None:
        """Tokens that ran at once in the build that goes on; None where none does."""
        settings = self._settings() if self.rows else None
        return None if settings is None else int(settings["batch_tokens"])

    def read(self, block: int) -> bool:
        """Take a block that is finished into ``rows`` and ``files``; return False where it is damaged."""
        path = self._record(str(block))
        if not path.is_file():
            return True
        found = self._checked(path)
        try:
            rows = tuple(map(ManifestUnit.from_json, found["rows"])) if found else ()
        except ValidationError:
            rows = ()
        if not found or not rows:
            path.unlink()
            return False
        self.rows[block] = rows
        self.files |= found["files"]
        return True

    def finish(self, block: int, rows: Sequence[ManifestUnit], tensors: Tensors, file: str) -> None:
        """Write a finished block.

        Args:
            block: Its index.
            rows: Its rows of the manifest.
            tensors: Its payloads.
            file: Name of the file that they are written to; none is where there are no tensors.
        """
        files = {file: self.add(tensors, file)} if tensors else {}
        self._write(str(block), files=files, rows=[row.to_json() for row in rows])

    def add(self, tensors: Tensors, file: str) -> str:
        """Write payloads into a file of this name; return its SHA-256."""
        path = self.payloads / file
        temporary = path.with_suffix(".tmp")
        write_tensors(tensors, temporary)
        self.files[file] = sha256_file(temporary)
        temporary.replace(path)
        return self.files[file]

    def statistics(self) -> dict[str, torch.Tensor]:
        """Return the statistics of the whole model that an earlier build has measured, by ``keep_statistics``' name."""
        record = self._record(STATISTICS)
        if not record.is_file() or not self._checked(record, folder=self.folder):
            return {}
        return load_file(self.folder / f"{STATISTICS}.safetensors")

    def keep_statistics(self, tensors: Tensors) -> None:
        """Write statistics of the whole model, which take a pass over all calibration text."""
        path = self.folder / f"{STATISTICS}.safetensors"
        write_tensors(tensors, path)
        self._write(STATISTICS, files={path.name: sha256_file(path)}, rows=[])

    def become_store(self) -> None:
        """Give the finished store its name."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.payloads.rename(self.target)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is finished when the body is interrupted, or the disk is full; remove it where it is no use."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, StoreError) or not any(self.folder.glob("[0-9]*.json")):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _settings(self) -> Mapping[str, Any] | None:
        """Return what ``begin`` wrote; None where it is damaged or of another store."""
        value = _read_json(self.folder / SETTINGS)
        same = value.get("address") == json_safe(json.loads(json.dumps(self.address)))
        return value if same and isinstance(value.get("batch_tokens"), int) else None

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, name: str, **content: Any) -> None:
        safe = json_safe(content)
        write_json(self._record(name), {"digest": digest(safe), **safe})

    def _checked(self, path: Path, folder: Path | None = None) -> Mapping[str, Any] | None:
        """Return a record whose own digest and whose files' hashes are right; None where they are not.

        Args:
            path: Of the record.
            folder: Of its files; None is that of payloads.
        """
        value = _read_json(path)
        if value.pop("digest", None) != digest(value):
            return None
        try:
            hashes = {name: sha256_file((folder or self.payloads) / name) for name in value["files"]}
        except OSError:
            return None
        return value if hashes == value["files"] else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
