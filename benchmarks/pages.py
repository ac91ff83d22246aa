"""How long the pages of MLflow and Optuna Dashboard take to show a finished multirun, in a real browser.

    python benchmarks/pages.py --folder where/the/runs/were/started --name quickstart [--screens docs]

Starts `mlflow server` and `optuna-dashboard` there and waits until each page's figures can be seen: `mlflow_first` with
an empty cache, the others after it, as somebody gets there who follows links. Prints seconds as JSON. With --screens,
the README's screenshots are written.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlflow import MlflowClient
from playwright.sync_api import Page

from tests.browser import chromium, close_assistant, mlflow_server, optuna_dashboard, scroll_to, see


def mlflow_pages(folder: Path, name: str, screens: Path | None) -> dict[str, float]:
    """Return seconds by page of MLflow's UI."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name).experiment_id
    runs = client.search_runs([experiment], "params.sampler != ''", order_by=["metrics.kl"])
    count = len(client.search_runs([experiment]))
    ids = json.dumps([run.info.run_id for run in runs[:4]])
    with mlflow_server(folder) as base:
        top = f"{base}/#/experiments/{experiment}"
        pages = {
            "runs": (
                f"{top}/runs?viewStateShareKey=evosweep&workflowType=machine_learning",
                [f"{count} matching runs"],
            ),
            "run": (f"{top}/runs/{runs[0].info.run_id}", ["generations after the start"]),
            "metrics": (f"{top}/runs/{runs[0].info.run_id}/model-metrics", ["units_changed"]),
            "artifacts": (f"{top}/runs/{runs[0].info.run_id}/artifacts", ["allocation.png"]),
            "compare": (f'{base}/#/compare-runs?runs={ids}&experiments=["{experiment}"]', ["Parallel Coordinates"]),
        }
        with chromium() as page:
            seconds = {"mlflow_first": _opened(page, base, ["Experiments"])}
            close_assistant(page)
            for key, (url, texts) in pages.items():
                seconds[f"mlflow_{key}"] = _opened(page, url, texts)
                if screens is not None:
                    if key == "artifacts":
                        page.get_by_text("allocation.png", exact=True).click()
                    if key == "metrics":
                        scroll_to(page, "img[src*=levels]")
                    _shot(page, screens / f"mlflow_{key}.png")
    return seconds


def dashboard_pages(folder: Path, name: str, study: str, screens: Path | None) -> dict[str, float]:
    """Return seconds by page of Optuna Dashboard."""
    with optuna_dashboard(folder, name) as base, chromium() as page:
        seconds = {"dashboard_list": _opened(page, f"{base}/dashboard", [study])}
        began = time.perf_counter()
        page.get_by_text(study).first.click()
        see(page, ["Best Trial", "validation KL by tokens scored"])
        seconds["dashboard_study"] = time.perf_counter() - began
        if screens is not None:
            page.get_by_text("validation KL by tokens scored").first.scroll_into_view_if_needed()
            _shot(page, screens / "dashboard.png")
    return seconds


def _opened(page: Page, url: str, texts: list[str]) -> float:
    began = time.perf_counter()
    page.goto(url)
    see(page, texts)
    return time.perf_counter() - began


def report_page(folder: Path, name: str, screens: Path) -> None:
    """Take a picture of the newest report of a search by evolution."""
    results = sorted(folder.glob(f"runs/{name}/**/result.json"), key=lambda path: path.stat().st_mtime)
    found = [path.parent for path in results if "evopress" in path.read_text(encoding="utf-8")]
    with chromium(offline=True) as page:
        page.goto((found[-1] / "report" / "report.html").as_uri())
        _shot(page, screens / "report.png")


def _shot(page: Page, path: Path) -> None:
    page.wait_for_timeout(2500)  # figures are still sliding in
    page.screenshot(path=path)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", default="quickstart")
    parser.add_argument("--study", default="evopress as_uniform=3 s0")
    parser.add_argument("--screens", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute()
    seconds = mlflow_pages(folder, options.name, options.screens)
    seconds |= dashboard_pages(folder, options.name, options.study, options.screens)
    if options.screens is not None:
        report_page(folder, options.name, options.screens)
    print(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
