"""Quality against true size, a line a kind of levels: the picture of what joint levels buy.

    python benchmarks/size.py bit-widths=runs/bits_low bit-widths=runs/bits_high joint=runs/joint --figure docs/size.png

Every result.json below a folder is a point; folders of one label are one line. They come from sweeps of the budget:

    python -m evosweep -m +experiment=joint budget.bits_per_weight=2.1,2.3,2.535,2.75 sampler=evopress_ilp \\
        search.generations=30 search.tokens=9000000
    python -m evosweep -m +experiment=quant_2.25bit budget.bits_per_weight=2.3,2.4,2.535 ...
"""

import argparse
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from evosweep.core.results import read_result


def main() -> None:
    """Print a table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", help="LABEL=FOLDER")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    dense = 0.0
    for line in options.lines:
        label, _, folder = line.partition("=")
        for path in Path(folder).rglob("result.json"):
            row = read_result(path)
            points[label].append((row["bits_per_weight"], row["kl"], row["ppl"]))
            dense = row["dense_ppl"]
    print("| levels | bits/weight | val KL | val PPL |\n|---|---|---|---|")
    for label, found in points.items():
        for bits, kl, ppl in sorted(found):
            print(f"| {label} | {bits:.3f} | {kl:.3f} | {ppl:.1f} |")
    if options.figure:
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axis = figure.subplots()
        for label, found in points.items():
            axis.plot(
                [each[0] for each in sorted(found)],
                [each[2] for each in sorted(found)],
                marker="o",
                markersize=4,
                label=label,
            )
        axis.axhline(dense, linestyle="--", linewidth=1, color="grey", label="dense, 16 bits")
        axis.set(xlabel="true bits per weight", ylabel="held-out PPL", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=9)
        figure.savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
