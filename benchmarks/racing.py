"""What racing saves, and how often it keeps whom a whole stage would have kept.

    python benchmarks/racing.py [--generations 30] [--seeds 0 1 2] [--errors 0.05 0.2] [--audit] [overrides]

For a GPU: quant_3bit with racing off and on. --audit: every stage that was raced is scored to its end, too (not
counted, not used), to see whether the survivors are the same.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import evosweep.pipeline
from evosweep.cli.main import main as evosweep_main
from evosweep.evaluate.scorer import StagedScorer
from evosweep.search.racing import Raced

SHOWN = ("seed", "kl", "ppl", "tokens", "tokens_saved", "seconds")
same: dict[tuple[float, int], list[bool]] = defaultdict(list)


class Audited(StagedScorer):
    """Scores a stage to its end after every race."""

    def race(self, genomes: Any, *, survivors: int, racing: Any, **place: Any) -> Raced:
        """Return the race's outcome; note whether its survivors are the whole stage's."""
        raced = super().race(genomes, survivors=survivors, racing=racing, **place)
        full = np.argsort(self.score(genomes, **place), kind="stable")[:survivors]
        kept = np.lexsort((raced.scores, raced.out))[:survivors]
        same[racing.error, place["stage"]].append(set(full) == set(kept))
        return raced


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--errors", type=float, nargs="+", default=[0.05])
    parser.add_argument("--audit", action="store_true", help="score raced stages to their end, too")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    if options.audit:
        evosweep.pipeline.StagedScorer = Audited  # type: ignore[misc]
    sys.argv = [
        "evosweep",
        "-m",
        "+experiment=quant_3bit",
        "sampler=evopress",
        "tracking=none",
        "export=none",
        f"search.generations={options.generations}",
        f"seed={','.join(map(str, options.seeds))}",
        f"search.racing={','.join(['null', *map(str, options.errors)])}",
        *options.overrides,
    ]
    evosweep_main()
    rows = defaultdict(list)
    for path in sorted(Path("runs").rglob("result.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        racing = next(each.partition("=")[2] for each in row["overrides"] if each.startswith("search.racing="))
        rows[racing].append({key: row[key] for key in SHOWN})
    kept = {f"{error} stage {stage}": round(float(np.mean(found)), 3) for (error, stage), found in sorted(same.items())}
    print(json.dumps({"results": rows, "same survivors": kept}, indent=1))


if __name__ == "__main__":
    main()
