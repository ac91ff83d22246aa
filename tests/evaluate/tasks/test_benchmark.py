"""The benchmark of tasks puts its accuracies beside published ones, and says what differs between them."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import tasks
from evosweep.evaluate.tasks.accuracy import PER_CHARACTER, SUM
from evosweep.evaluate.tasks.library import LIBRARY


def row(task: str, score: str, acc: float, acc_norm: float) -> dict:
    figures = {"acc": acc, "acc_norm": acc_norm, "greedy": 0.0}
    made = {metric: {"accuracy": value, "stderr": 0.01} for metric, value in figures.items()}
    return {
        "task": task,
        "questions": 1000,
        "score": score,
        "tokens": 5000,
        "seconds": 2.0,
        "tokenizing_seconds": 0.5,
    } | made


def test_published_figures_stand_beside_ours_in_the_same_metric() -> None:
    found = tasks.tables(
        [
            row("hellaswag", PER_CHARACTER, 0.30, 0.42),
            row("arc_easy", SUM, 0.54, 0.50),
            row("arc_challenge", PER_CHARACTER, 0.20, 0.28),
        ]
    ).splitlines()
    assert "| hellaswag | 1,000 | 30.0 ± 1.0 | **42.0 ± 1.0** | 5,000 | 2.0 | 0.5 |" in found
    assert f"| hellaswag | acc_norm | {tasks.HARNESS} | 43.0 | 42.0 ± 1.0 | -1.0 | {tasks.WEIGHTS} |" in found
    assert f"| arc_easy | acc | {tasks.HARNESS} | 54.1 | 54.0 ± 1.0 | -0.1 | {tasks.TEST} |" in found
    (mean,) = [line for line in found if line.startswith("| arc_easy, arc_challenge |") and tasks.CARD in line]
    assert "| 37.3 | 39.0 ± 0.7 | +1.7 |" in mean and tasks.CHAT in mean
    assert not any("piqa" in line for line in found) and any("All tasks: 6.0 s a model" in line for line in found)


def test_every_published_task_is_one_that_is_asked() -> None:
    assert {task for one in tasks.PUBLISHED for task in one.tasks} <= set(LIBRARY)
    assert all(one.metric in tasks.METRICS and (one.differs or one.source == tasks.HARNESS) for one in tasks.PUBLISHED)


def test_lines_of_an_earlier_run_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"machine": "some card"}, row("hellaswag", PER_CHARACTER, 0.30, 0.42), {"peak_gb": 1.0}]
    (tmp_path / "lines.jsonl").write_text(
        "Loading\n" + "".join(json.dumps(line) + "\n" for line in lines) + "\n| a |\n"
    )
    monkeypatch.setattr(sys, "argv", ["tasks", "--read", str(tmp_path / "lines.jsonl")])
    tasks.main()
    assert "| hellaswag | 1,000 |" in capsys.readouterr().out
