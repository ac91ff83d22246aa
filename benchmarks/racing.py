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

from evosweep.cli.main import main as evosweep_main
from evosweep.core.results import read_result
from evosweep.search.protocols import Genomes, Scorer
from evosweep.search.racing import Racing
from evosweep.search.survival import Outcome, Race

SHOWN = ("seed", "kl", "ppl", "tokens", "tokens_saved", "seconds")
same: dict[tuple[float, int], list[bool]] = defaultdict(list)


class Audited(Race):
    """A race after which the stage is scored to its end, to see whether the same candidates survive.

    Args:
        error: As for ``Racing``.
    """

    def __init__(self, error: float) -> None:
        super().__init__(Racing(error))

    def run(
        self, genomes: Genomes, *, scorer: Scorer, generation: int, stage: int, tokens: int, survivors: int
    ) -> Outcome:
        """Return the race's outcome; note whether its survivors are the whole stage's."""
        place: dict[str, Any] = {"generation": generation, "stage": stage, "tokens": tokens}
        outcome = super().run(genomes, scorer=scorer, survivors=survivors, **place)
        whole = np.argsort(scorer.score(genomes, **place), kind="stable")[:survivors]
        same[self.racing.error, stage].append(set(whole) == set(outcome.order()[:survivors]))
        return outcome


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
    races = [f"{{_target_:__main__.Audited,error:{each}}}" if options.audit else str(each) for each in options.errors]
    sys.argv = [
        "evosweep",
        "-m",
        "+experiment=quant_3bit",
        "sampler=evopress",
        "tracking=none",
        "export=none",
        f"search.generations={options.generations}",
        f"seed={','.join(map(str, options.seeds))}",
        f"search.racing={','.join(['null', *races])}",
        *options.overrides,
    ]
    evosweep_main()
    rows = defaultdict(list)
    for path in sorted(Path("runs").rglob("result.json")):
        row = read_result(path)
        racing = next(each.partition("=")[2] for each in row["overrides"] if each.startswith("search.racing="))
        rows[racing].append({key: row[key] for key in SHOWN})
    kept = {f"{error} stage {stage}": round(float(np.mean(found)), 3) for (error, stage), found in sorted(same.items())}
    print(json.dumps({"results": rows, "same survivors": kept}, indent=1))


if __name__ == "__main__":
    main()
