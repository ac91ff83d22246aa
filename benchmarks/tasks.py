"""How long the tasks take, and how near the dense model's accuracy is to published figures.

    python benchmarks/tasks.py [--limit 100] [--device cpu] [--dtype auto] [--tasks hellaswag piqa]
    python benchmarks/tasks.py --read lines.jsonl

Asks SmolLM2-135M-Instruct, dense, every task of ``tasks=core``. It prints a JSON line as each task ends, then Markdown:
accuracy by plain log-likelihood (acc) and by log-likelihood a character (acc_norm) with their standard errors, seconds,
published figures. Reading and tokenizing the questions is not in the seconds, the first download neither; tokenizing is
done once for all allocations of a run. ``--limit 0`` asks every question. ``--read`` makes the tables of JSON lines.

With a limit, the first questions are asked, which is another sample than the published one.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.shown import machine
from evosweep.core.events import Silent
from evosweep.evaluate.tasks.accuracy import GREEDY, PER_CHARACTER, SUM, judged
from evosweep.evaluate.tasks.library import LIBRARY
from evosweep.evaluate.tasks.log_likelihood import likelihoods
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.models.load import LoadedModel, ModelSource

METRICS = {"acc": SUM, "acc_norm": PER_CHARACTER, "greedy": GREEDY}
HARNESS = "lm-evaluation-harness, this model"
CARD = "lighteval, this model"
BASE = "lighteval, SmolLM2-135M before tuning"
SOURCES = (
    f"{HARNESS}: huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion, its baseline. {CARD} and {BASE}: the "
    "card of huggingface.co/HuggingFaceTB/SmolLM2-135M; ARC there is the mean of Easy and Challenge, all acc_norm."
)
ALL = (
    "Everywhere: the model here was dequantized from 4 bits (Q4_1), the published ones are the 16-bit checkpoints. "
    "All are zero-shot, in cloze form."
)


@dataclass(frozen=True)
class Published:
    """A published accuracy.

    Attributes:
        tasks: Whose mean it is.
        metric: ``acc`` or ``acc_norm``.
        accuracy: In percent.
        source: Who measured it, and of which model.
        differs: What else differs from what is measured here; empty: nothing.
    """

    tasks: tuple[str, ...]
    metric: str
    accuracy: float
    source: str
    differs: str


WEIGHTS = "the weights alone: from 4 bits here"
ARC = ("arc_easy", "arc_challenge")
TEST = "test split (here validation)"
CHAT = "questions inside the chat template"
PUBLISHED = (
    Published(("hellaswag",), "acc_norm", 42.99, HARNESS, ""),
    Published(("piqa",), "acc_norm", 66.92, HARNESS, '"Question:" before the goal (here "Goal:")'),
    Published(("arc_easy",), "acc", 54.12, HARNESS, TEST),
    Published(("arc_challenge",), "acc_norm", 27.73, HARNESS, TEST),
    Published(("hellaswag",), "acc_norm", 40.9, CARD, CHAT),
    Published(ARC, "acc_norm", 37.3, CARD, f"{CHAT}; {TEST}"),
    Published(("piqa",), "acc_norm", 66.3, CARD, f'{CHAT}; "Question:" before the goal'),
    Published(("hellaswag",), "acc_norm", 42.1, BASE, "another model; two spaces before an ending"),
    Published(ARC, "acc_norm", 43.9, BASE, f"another model; {TEST}"),
    Published(("piqa",), "acc_norm", 68.4, BASE, 'another model; "Question:" before the goal'),
    Published(("commonsense_qa",), "acc_norm", 33.9, BASE, 'another model; no "Question:" and "Answer:" around it'),
    Published(("winogrande",), "acc_norm", 51.3, BASE, "another model; endings compared behind the bare sentence"),
    Published(
        ("openbookqa",), "acc_norm", 34.6, BASE, f'another model; no "Question:" and "Answer:" around it; {TEST}'
    ),
)


def smollm2(**changes: str) -> ModelSource:
    """Return the model of ``model=smollm2``, with other settings."""
    settings = OmegaConf.load(Path(__file__).parents[1] / "conf" / "model" / "smollm2.yaml")
    return instantiate(OmegaConf.merge(settings, changes))  # type: ignore[no-any-return]


def measured(name: str, loaded: LoadedModel, *, limit: int | None, batch_tokens: int) -> dict[str, Any]:
    """Return accuracies of a task by every way of comparing choices, and what asking it took.

    Args:
        name: Of the task.
        loaded: The model and its tokenizer.
        limit: Questions at most; None: all.
        batch_tokens: Tokens at once.
    """
    tasks = Tasks(names=[name], limit=limit, batch_tokens=batch_tokens)
    questions = tasks.questions()[name]
    began = time.monotonic()
    encoded = tasks.encoded(name, loaded.model, tokenizer=loaded.tokenizer)
    tokenized = time.monotonic()
    found = likelihoods(loaded.model, encoded, batch_tokens=batch_tokens)
    ended = time.monotonic()
    row: dict[str, Any] = {"task": name, "questions": len(questions), "score": tasks.score_of(name)}
    for metric, score in METRICS.items():
        accuracy = judged(questions, found, score)
        row[metric] = {"accuracy": accuracy.mean, "stderr": accuracy.error}
    return row | {
        "tokens": sum(len(item.context) + sum(map(len, item.choices)) for item in encoded),
        "seconds": round(ended - tokenized, 2),
        "tokenizing_seconds": round(tokenized - began, 2),
    }


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a line a task, then a line a published figure."""
    lines = [
        "| task | questions | acc, % | acc_norm, % | tokens | seconds | tokenizing, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_accuracy(row, metric) for metric in ("acc", "acc_norm")]
        if row["score"] == GREEDY:
            cells = [_accuracy(row, "greedy", bold=True), ""]
        numbers = f"{row['tokens']:,} | {row['seconds']:.1f} | {row['tokenizing_seconds']:.1f}"
        lines.append(f"| {row['task']} | {row['questions']:,} | {' | '.join(cells)} | {numbers} |")
    total = f"All tasks: {sum(row['seconds'] for row in rows):.1f} s a model, and tokenizing once: "
    total += f"{sum(row['tokenizing_seconds'] for row in rows):.1f} s. Tokens are those of contexts, once for all of a "
    total += "question's choices, and of choices. Bold is what `tasks=core` goes by."
    return "\n".join([*lines, "", total, "", *_published({row["task"]: row for row in rows})])


def _accuracy(row: Mapping[str, Any], metric: str, *, bold: bool = False) -> str:
    value = f"{100 * row[metric]['accuracy']:.1f} ± {100 * row[metric]['stderr']:.1f}"
    return f"**{value}**" if bold or METRICS[metric] == row["score"] else value


def _published(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines of published figures beside ours, the difference, and what differs in how they were measured."""
    lines = [
        "| task | metric | published by | published | here | difference | what differs |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in PUBLISHED:
        if set(one.tasks) <= set(rows):
            found = [rows[task][one.metric] for task in one.tasks]
            ours = 100 * sum(item["accuracy"] for item in found) / len(found)
            error = 100 * sum(item["stderr"] ** 2 for item in found) ** 0.5 / len(found)
            figures = f"{one.accuracy:.1f} | {ours:.1f} ± {error:.1f} | {ours - one.accuracy:+.1f}"
            name = ", ".join(one.tasks)
            lines.append(f"| {name} | {one.metric} | {one.source} | {figures} | {one.differs or WEIGHTS} |")
    return [*lines, "", f"{SOURCES} {ALL}"] if len(lines) > 2 else []


def main() -> None:
    """Print JSON lines, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", nargs="+", default=list(LIBRARY))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--read", type=Path, help="JSON lines of an earlier run: make the tables of them, run nothing")
    options = parser.parse_args()
    if options.read:
        lines = options.read.read_text(encoding="utf-8").splitlines()
        rows = [row for row in (json.loads(line) for line in lines if line.startswith("{")) if "task" in row]
    else:
        loaded = smollm2(device=options.device, dtype=options.dtype).load(progress=Silent())
        rows = []
        print(json.dumps({"machine": machine(), "device": options.device, "dtype": options.dtype}), flush=True)
        for name in options.tasks:
            limit = options.limit or None
            rows.append(measured(name, loaded, limit=limit, batch_tokens=options.batch_tokens))
            print(json.dumps(rows[-1]), flush=True)
        if options.device.startswith("cuda"):
            print(json.dumps({"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}), flush=True)
    print(f"\n{tables(rows)}")


if __name__ == "__main__":
    main()
