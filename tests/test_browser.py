"""A finished multirun as its user sees it. Needs Debian's chromium, or another Chromium, on the path."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cli import TINY, evosweep, workplace

browser = pytest.importorskip("tests.browser", reason="needs playwright")
pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium: apt-get install chromium")
SAMPLERS = ("uniform", "owl", "ilp", "evopress")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("seen")) as folder:
        searches = [f"sampler={','.join(SAMPLERS)}", "search.generations=4", "seed=1", "export=none"]
        assert evosweep("-m", *TINY, *searches, "name=seen") == 0
        yield folder


@pytest.fixture(scope="module")
def rows(finished: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in finished.glob("runs/seen/*/*/result.json")]
    return {row["sampler"]: row for row in found}


@pytest.fixture(scope="module")
def mlflow_url(finished: Path):
    with browser.mlflow_server(finished) as url:
        yield url


@pytest.fixture(scope="module")
def dashboard_url(finished: Path):
    with browser.optuna_dashboard(finished, "seen") as url:
        yield url


@pytest.fixture
def page():
    with browser.chromium() as page:
        yield page


def experiment(finished: Path) -> str:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    return str(client.get_experiment_by_name("seen").experiment_id)


def test_the_printed_link_opens_a_table_of_all_searches_best_first(page, mlflow_url: str, rows: dict) -> None:
    page.goto(rows["ilp"]["mlflow_link"].replace("http://127.0.0.1:5000", mlflow_url))
    browser.close_assistant(page)
    browser.see(page, ["result/kl", "result/ppl", "result/bits_per_weight", "result/tokens", "4 matching runs"])
    order = sorted(rows.values(), key=lambda row: row["kl"])
    names = page.locator("[role=row] a", has_text="as_uniform=3").all_inner_texts()
    assert names[0].split()[0] == order[0]["sampler"] and len(names) == 4
    shown = page.inner_text("body")
    assert all(str(row["kl"])[:7] in shown for row in rows.values())


def test_runs_are_compared_by_what_they_chose(page, mlflow_url: str, rows: dict, finished: Path) -> None:
    ids = json.dumps([row["mlflow_run"] for row in rows.values()])
    page.goto(f'{mlflow_url}/#/compare-runs?runs={ids}&experiments=["{experiment(finished)}"]')
    browser.see(page, ["Comparing 4 Runs", "Parallel Coordinates Plot"])
    plot = page.locator(".js-plotly-plot").first
    plot.get_by_text("val/kl", exact=True).wait_for()
    shown = plot.inner_text()
    assert all(name in shown for name in SAMPLERS)


def test_a_run_has_its_summary_and_its_pictures(page, mlflow_url: str, rows: dict, finished: Path) -> None:
    run = f"{mlflow_url}/#/experiments/{experiment(finished)}/runs/{rows['evopress']['mlflow_run']}"
    page.goto(run)
    browser.see(page, ["generations after the start", "evopress-s1", "seen validation"])
    page.goto(f"{run}/artifacts")
    page.get_by_text("allocation.png", exact=True).click()
    picture = page.locator("img[src*=blob], img[src*=allocation]").first
    picture.wait_for()
    page.wait_for_function("picture => picture.naturalWidth > 300", arg=picture.element_handle())
    page.get_by_text("allocation_table.json", exact=True).click()
    browser.see(page, ["relative_error", "mlp.down_proj"])


def test_the_report_needs_no_network(finished: Path, rows: dict) -> None:
    path = (
        next(
            path.parent
            for path in finished.glob("runs/seen/*/*/result.json")
            if json.loads(path.read_text())["sampler"] == "evopress"
        )
        / "report"
        / "report.html"
    )
    asked: list[str] = []
    with browser.chromium(offline=True) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        assert len(widths) == 4 and min(widths) > 300
        browser.see(page, [f"{rows['evopress']['kl']:.4f}"])
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_dashboard_shows_history_and_our_figures(page, dashboard_url: str) -> None:
    page.goto(f"{dashboard_url}/dashboard")
    page.get_by_text("evopress as_uniform=3 s1").click()
    browser.see(page, ["History", "Hyperparameter Importance", "bits/self_attn.q_proj"])
    page.wait_for_function("document.querySelectorAll('#plot-history .scatterlayer .point').length >= 2")
    browser.see(page, ["evopress: validation KL by tokens scored", "evopress: level of every layer"])
    assert page.get_by_text("mlp.gate_proj").count() > 0


def test_the_dashboard_shows_an_elite_s_levels(page, dashboard_url: str) -> None:
    page.goto(f"{dashboard_url}/dashboard")
    page.get_by_text("evopress as_uniform=3 s1").click()
    page.wait_for_url("**/studies/*")
    page.goto(f"{page.url}/trials?numbers=0")
    browser.see(page, ["levels_0000.png"])
    picture = page.locator("img[src*='/artifacts/']").first
    picture.wait_for()
    page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
