"""Ranks in earlier stages of the offspring that was best in the last: do the stages drop the right candidates?"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from evosweep.core.events import GenerationRecord, SearchResult
from evosweep.core.files import write_json


class Stages:
    """Survival of offspring from stage to stage, and the rank at each stage of the one that was best in the last.

    If the best offspring of the last stage was often among the last that an earlier stage let through, others as good
    were cut there by noise: that stage wants more tokens or more survivors.
    """

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``stages.json`` and ``stages.png``; nothing where fewer than two stages were ever scored."""
        found = [line for record in result.generations if len(line := ranks(record)) > 1]
        if not found:
            return
        count = max(len(line) for line in found)
        table = np.full((len(found), count, 2), np.nan)
        for row, line in enumerate(found):
            table[row, : len(line)] = line
        write_json(
            folder / "stages.json",
            {
                "columns": ["stage", "scored", "survived_percent", "median_rank_of_best"],
                "data": _lines(table),
            },
        )
        self._draw(table, result, folder / "stages.png")

    @staticmethod
    def _draw(table: npt.NDArray[np.float64], result: SearchResult, path: Path) -> None:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        stages = range(table.shape[1])
        scored = np.nanmean(table[:, :, 0], axis=0)
        left.bar_label(left.bar(stages, scored, color="C0"), fmt="%.3g", fontsize=9)
        left.set_yscale("log")
        left.set_ylim(scored.min() / 2, 1.5 * scored.max())
        left.yaxis.set_minor_formatter(NullFormatter())
        left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        left.set_xticks(stages)
        left.set_title("how many are scored", fontsize=10)
        right.set_title("where the last stage's best ranked before", fontsize=10)
        left.set_xlabel("stage")
        left.set_ylabel("offspring scored a generation")
        for stage in stages[:-1]:
            shown = table[:, stage, 1]
            right.hist(100 * shown[np.isfinite(shown)], bins=20, range=(0, 100), alpha=0.6, label=f"stage {stage}")
            right.axvline(100 * _passed(table, stage), linestyle="--", linewidth=1, color=f"C{stage}")
        right.set_xlabel("rank of the best offspring (% of scored; dashed: cut)")
        right.set_ylabel("generations")
        right.legend()
        figure.suptitle(f"{result.sampler}, seed {result.seed}: do the stages cut the right ones?")
        figure.savefig(path, dpi=120)


def ranks(record: GenerationRecord) -> list[tuple[int, float]]:
    """Return, for every stage, how many offspring were scored and the rank there (0 to 1) of the last stage's best."""
    scored = [candidate for candidate in record.candidates if candidate.scores and candidate.duplicate_of is None]
    if not scored:
        return []
    last = max(max(candidate.scores) for candidate in scored)
    best = min(
        (candidate for candidate in scored if last in candidate.scores),
        key=lambda candidate: (candidate.scores[last], candidate.slot),
    )
    lines = []
    for stage in sorted({stage for candidate in scored for stage in candidate.scores}):
        values = np.array([candidate.scores[stage] for candidate in scored if stage in candidate.scores])
        if stage in best.scores:
            lines.append((len(values), float((values < best.scores[stage]).sum()) / len(values)))
    return lines


def _passed(table: npt.NDArray[np.float64], stage: int) -> float:
    """Return the share of a stage's offspring that the next one scored."""
    return float(np.nanmean(table[:, stage + 1, 0]) / np.nanmean(table[:, stage, 0]))


def _lines(table: npt.NDArray[np.float64]) -> list[list[Any]]:
    last = table.shape[1] - 1
    return [
        [
            stage,
            float(np.nanmean(table[:, stage, 0])),
            None if stage == last else 100 * _passed(table, stage),
            100 * float(np.nanmedian(table[:, stage, 1])),
        ]
        for stage in range(last + 1)
    ]
