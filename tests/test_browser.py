"""A finished multirun as its user sees it, at 1440 x 900 with a fresh profile. Needs Debian's chromium, or another."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from evosweep.core.results import read_result
from tests.cli import TINY, evosweep, workplace

browser = pytest.importorskip("tests.browser", reason="needs playwright")
pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium: apt-get install chromium")
SAMPLERS = ("uniform", "owl", "ilp", "evopress")
EDGE = 1090  # pixels from the left: what is further right lies under MLflow's assistant, open in a fresh profile


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("seen")) as folder:
        searches = [f"sampler={','.join(SAMPLERS)}", "search.generations=6", "seed=0", "export=none"]
        assert evosweep("-m", *TINY, *searches, "name=seen") == 0
        yield folder


@pytest.fixture(scope="module")
def rows(finished: Path) -> dict[str, dict]:
    found = [read_result(path) for path in finished.glob("runs/seen/*/*/result.json")]
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


def run_page(url: str, finished: Path, row: dict) -> str:
    return f"{url}/#/experiments/{experiment(finished)}/runs/{row['mlflow_run']}"


def test_the_printed_link_opens_a_table_of_all_searches_best_first(page, mlflow_url: str, rows: dict) -> None:
    page.goto(rows["ilp"]["mlflow_link"].replace("http://127.0.0.1:5000", mlflow_url))
    browser.see(page, ["5 matching runs", "Searches by"])  # the searches and their parent; the description
    for heading in ("kl", "ppl"):
        box = page.get_by_role("columnheader", name=heading, exact=True).first.bounding_box()
        assert box["x"] + box["width"] < EDGE and box["y"] < 600, heading
    browser.close_assistant(page)
    order = sorted(rows.values(), key=lambda row: row["kl"])
    names = page.locator("[role=row] a", has_text="as_uniform=3").all_inner_texts()
    assert len(names) == 5 and any(name.startswith("best of 4: tiny") for name in names[:2])
    searches = [name.split()[1] for name in names if not name.startswith("best")]
    assert searches[0] == order[0]["sampler"] and set(searches) == set(SAMPLERS)
    shown = page.inner_text("[role=grid], [role=treegrid]")
    assert all(f"{row['kl']:.4g}" in shown for row in rows.values())
    headings = [text.strip() for text in page.get_by_role("columnheader").all_inner_texts()]
    assert "sampler" in headings and not {"model", "seed", "budget", "fitness"} & set(headings)


def test_the_charts_begin_with_results_and_what_was_varied(page, mlflow_url: str, rows: dict) -> None:
    link = rows["ilp"]["mlflow_link"].replace("http://127.0.0.1:5000", mlflow_url)
    page.goto(f"{link}&compareRunsMode=CHART")
    page.locator(".js-plotly-plot").first.wait_for()
    shown = page.inner_text("body")
    order = [shown.index(text) for text in ("\nresults", "\nkl\n", "\nppl\n", "\nsearch")]
    assert order == sorted(order)


def test_runs_are_compared_by_what_was_varied(page, mlflow_url: str, rows: dict, finished: Path) -> None:
    ids = json.dumps([row["mlflow_run"] for row in rows.values()])
    page.goto(f'{mlflow_url}/#/compare-runs?runs={ids}&experiments=["{experiment(finished)}"]')
    browser.see(page, ["Comparing 4 Runs", "Parallel Coordinates Plot"])
    plot = page.locator(".js-plotly-plot").first
    plot.get_by_text("kl", exact=True).wait_for()
    shown = plot.inner_text()
    assert "sampler" in shown and "seed" not in shown and all(name in shown for name in SAMPLERS)


def test_a_run_says_what_was_found_and_names_its_parent(page, mlflow_url: str, rows: dict, finished: Path) -> None:
    page.goto(run_page(mlflow_url, finished, rows["evopress"]))
    browser.see(page, ["generations after the start", "Validation never selects", "best of 4: tiny", "seen validation"])
    page.goto(f"{run_page(mlflow_url, finished, rows['evopress'])}/artifacts")
    page.get_by_text("allocation_table.json", exact=True).click()
    browser.see(page, ["relative_error", "mlp.down_proj"])


def test_the_metrics_page_has_lines_that_vary_bars_and_pictures(
    page, mlflow_url: str, rows: dict, finished: Path
) -> None:
    page.goto(f"{run_page(mlflow_url, finished, rows['evopress'])}/model-metrics")
    browser.see(page, ["units_changed", "0_gain_over_median"])
    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    metrics = client.get_run(rows["evopress"]["mlflow_run"]).data.metrics
    assert not [key for key in metrics if key.startswith("system/")]  # on a CPU
    picture = browser.scroll_to(page, "img[src*=levels]")
    page.wait_for_function("picture => picture.naturalWidth > 100", arg=picture.element_handle())


def test_the_report_is_read_in_order_and_needs_no_network(finished: Path, rows: dict) -> None:
    folder = next(
        path.parent for path in finished.glob("runs/seen/*/*/result.json") if read_result(path)["sampler"] == "evopress"
    )
    with browser.chromium(offline=True) as page:
        page.goto((folder / "report" / "report.html").as_uri())
        browser.see(page, [f"{rows['evopress']['kl']:.4f}", "Validation never selects"])
        titles = page.locator("h2").all_inner_texts()
        assert titles[:3] == ["Allocation", "Search", "Stages"]
        widths = page.eval_on_selector_all("img", "found => found.map(each => each.naturalWidth)")
        assert len(widths) >= 3 and all(width > 300 for width in widths)
        assert {"What the budget was spent on", "Token by token", "More than the mean"} <= set(titles)
        assert page.locator(".tokens").count() == 2 and page.locator(".tokens span[title]").count() > 50
        for width in (1440, 390):  # nothing but tables and code that scroll by themselves is wider than the screen
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_dashboard_s_best_trial_is_the_exported_one(page, dashboard_url: str) -> None:
    page.goto(f"{dashboard_url}/dashboard")
    page.get_by_text("evopress as_uniform=3 s0").click()
    browser.see(page, ["Best Trial", "evopress: validation KL by tokens scored", "evopress: level of every layer"])
    assert page.get_by_text("mlp.gate_proj").count() > 0
    page.wait_for_url("**/studies/*")
    page.goto(f"{page.url}/trials?numbers=25")
    browser.see(page, ["exported", "levels_by_layer", "levels_0"])
    picture = page.locator("img[src*='/artifacts/']").first
    picture.wait_for()
    page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
