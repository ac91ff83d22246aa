"""What users see: a real Chromium before a real ``mlflow server`` and a real ``optuna-dashboard``."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ENTRY = """
import sys
from importlib.metadata import entry_points
found = next(iter(entry_points(group="console_scripts", name=sys.argv[1])))
sys.argv = sys.argv[1:]
found.load()()
"""  # an installed command, wherever this environment keeps its scripts
PATIENCE = 60_000  # milliseconds that anything may take on a busy machine
SIZE = {"width": 1440, "height": 900}


@contextmanager
def served(program: str, *arguments: str, folder: Path, ready: str = "") -> Iterator[str]:
    """Serve a folder with a program of this environment; yield the address."""
    port = _free_port()
    command = [sys.executable, "-c", ENTRY, program, *arguments, "--port", str(port)]
    with (folder / f"{program}.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"
    try:
        _wait(base + ready, server)
        yield base
    finally:
        server.terminate()
        server.wait(timeout=60)


def mlflow_server(folder: Path) -> AbstractContextManager[str]:
    """Serve the runs that a user of this folder would see: MLflow's defaults, but for the port."""
    return served("mlflow", "server", "--workers", "1", folder=folder, ready="/health")


def optuna_dashboard(folder: Path, name: str) -> AbstractContextManager[str]:
    """Serve the studies with the command that a run prints at its end, but for the port."""
    command = (f"studies/{name}.journal", "--artifact-dir", "studies/artifacts")
    return served("optuna-dashboard", *command, folder=folder, ready="/api/studies")


@contextmanager
def chromium(*, offline: bool = False) -> Iterator[Page]:
    """Yield an empty page of a browser of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport=SIZE, offline=offline).new_page()
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def close_assistant(page: Page) -> None:
    """Shut the panel that MLflow opens beside every page at first."""
    heading = page.get_by_text("MLflow Assistant").first
    heading.wait_for()
    heading.locator("xpath=ancestor::*[.//button][1]").get_by_role("button").last.click()
    page.get_by_placeholder("Ask a question").wait_for(state="hidden")


def see(page: Page, texts: Sequence[str]) -> None:
    """Wait until all of these can be seen."""
    for text in texts:
        page.get_by_text(text).locator("visible=true").first.wait_for()


def scroll_to(page: Page, selector: str) -> Locator:
    """Scroll the page's main part down until something that is made when it comes into sight is there."""
    found = page.locator(selector).first
    page.mouse.move(SIZE["width"] / 2, SIZE["height"] / 2)
    for _ in range(60):
        if found.count():
            break
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(500)
    found.scroll_into_view_if_needed()
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(url: str, server: subprocess.Popen) -> None:
    for _ in range(4 * PATIENCE // 1000):
        try:
            urllib.request.urlopen(url, timeout=PATIENCE / 1000).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) or server.poll() is not None:
                raise
            time.sleep(0.25)
    raise TimeoutError(url)
