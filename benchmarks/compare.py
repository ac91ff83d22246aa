"""The comparison of `+experiment=compare` again, from what its runs left: tables, figures, an MLflow run.

    python benchmarks/compare.py runs/quant_3bit runs/sparsity_60 [--figure docs/compare.png] [--mlflow]

Every result.json below a folder counts; folders may come from another machine, so that several comparisons can be put
beside each other. --mlflow logs the table and the figures as a run of an experiment called "compare".
"""

import argparse
import json
import tempfile
from pathlib import Path

from evosweep.core.files import write_json
from evosweep.core.results import read_result
from evosweep.tracking import comparison
from evosweep.tracking.artifacts.compared import FIGURES, convergence
from evosweep.tracking.mlflow_tracker import MlflowTracker


def additivity(folder: Path) -> list[str]:
    """Return a line for every search that tested the premise of additive layer errors."""
    lines = []
    for path in sorted(folder.rglob("additivity.json")):
        found = json.loads(path.read_text())
        row = read_result(path.parents[1] / "result.json")
        lines.append(
            f"{row['run']}: Pearson {found['pearson']:.2f}, Spearman {found['spearman']:.2f}, "
            f"{found['violations_percent']:.0f} % of {found['pairs']:.0f} pairs in the wrong order"
        )
    return lines


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--mlflow", action="store_true")
    options = parser.parse_args()
    everything = []
    for folder in options.folders:
        rows = [read_result(path) for path in sorted(folder.rglob("result.json"))]
        everything += rows
        print(f"\n### {folder.name}\n\n{comparison.markdown(rows)}\n", *additivity(folder), sep="\n")
    with tempfile.TemporaryDirectory() as name:
        if options.figure:
            [drawn] = convergence(everything, Path(name))
            options.figure.write_bytes(drawn.read_bytes())
        if options.mlflow:
            tracker = MlflowTracker(experiment="compare")
            tracker.start(" ".join(folder.name for folder in options.folders), params={}, tags={})
            data = {"columns": comparison.COLUMNS, "data": comparison.table(everything)}
            for path in [
                write_json(Path(name) / "comparison.json", data),
                *(path for draw in FIGURES for path in draw(everything, Path(name))),
            ]:
                tracker.file(path)
            tracker.close("FINISHED")


if __name__ == "__main__":
    main()
