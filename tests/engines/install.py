"""Makes the virtual environments of the engines that tests run: python -m tests.engines.install [name ...].

A requirements file may begin with "# shares: ours": that engine sees this environment's packages (torch, transformers)
beneath its own. "# afterwards: uninstall a b" takes packages away that the engine pulls in but that do not load here.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.engines.environment import REQUIREMENTS, engine_folder

AT_ONCE = 3


def install(name: str) -> Path:
    """Makes an engine's environment where it is missing; returns its folder."""
    folder = engine_folder(name)
    if (folder / "ready").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pins = REQUIREMENTS / f"{name}.txt"
    text = pins.read_text(encoding="utf-8")
    venv.create(folder, with_pip=True)
    if "# shares: ours" in text:
        packages = next(folder.glob("lib/python*/site-packages"))
        (packages / "zz_ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--requirement", str(pins)], check=True)
    for names in re.findall(r"^# afterwards: uninstall (.+)$", text, flags=re.MULTILINE):
        subprocess.run([*pip, "uninstall", "--yes", *names.split()], check=True)
    (folder / "ready").touch()
    return folder


def main() -> None:
    """Makes the environments that are named, or all."""
    names = sys.argv[1:] or sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    with ThreadPoolExecutor(AT_ONCE) as pool:  # pip mostly waits for the index and the disk
        for name, folder in zip(names, pool.map(install, names), strict=True):
            sys.stdout.write(f"{name}: {folder}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
