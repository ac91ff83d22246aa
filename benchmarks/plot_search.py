"""The evaluator's figure of the README, from what benchmarks/search.py printed.

python benchmarks/search.py --device cuda ... > search.json
python benchmarks/plot_search.py search.json docs/search.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(source: str, target: str) -> None:
    """Draw tokens per second of every way, fastest on top."""
    facts = json.loads(Path(source).read_text(encoding="utf-8"))
    rates = sorted(facts["result"]["tokens_per_second"].items(), key=lambda row: row[1])
    options = facts["options"]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name, _ in rates]
    bars = axes.barh([name for name, _ in rates], [rate / 1000 for _, rate in rates], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set(xlabel="thousand tokens scored per second")
    axes.set_title(f"{options['offspring']} candidates x {options['windows'] * options['seq_len']} tokens", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
