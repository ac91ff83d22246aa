"""Perplexity by generation at the size of uniform 3-bit, beside what EvoPress's own scripts reach.

    python benchmarks/quant_3bit.py [--generations 30] [--seeds 0 1 2] [--folder runs-here]

For a GPU: 64 offspring, stages 8/2/1 at 2048/8192/32768 tokens, 524k calibration tokens, GPTQ asymmetric in groups of
64, levels 2-6. The figures of EvoPress's scripts (same model, their own text cleaning): dense 15.99, uniform 46.53,
39.3 after 5 generations, 36.0 after 12.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna

from evosweep.tracking.study.record import ELITE
from evosweep.tracking.study.storage import Journal

SHOWN = (0, 5, 12, 30)


def by_generation(study: optuna.Study) -> dict[int, float]:
    """Return the elite's validation perplexity after each generation of interest."""
    elites = {
        trial.user_attrs["generation"]: trial.user_attrs["val_ppl"]
        for trial in study.trials
        if trial.user_attrs.get(ELITE)
    }
    return {shown: round(elites[max(generation for generation in elites if generation <= shown)], 2) for shown in SHOWN}


def main() -> None:
    """Run the searches and print what they reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("overrides", nargs="*", help="further settings, e.g. store.token_weighting=plain")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    common = ["+experiment=quant_3bit", "tracking=none", "export=none", *options.overrides]
    seeds = ",".join(map(str, options.seeds))
    for search in (
        ["sampler=uniform,owl,ilp"],
        ["sampler=evopress", f"search.generations={options.generations}", f"seed={seeds}"],
    ):
        subprocess.run([sys.executable, "-m", "evosweep", "-m", *common, *search], cwd=options.folder, check=True)
    storage = Journal(path=str(options.folder / "studies" / "quant_3bit.journal")).open()
    for summary in optuna.get_all_study_summaries(storage):
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        result = study.user_attrs["result"]
        print(json.dumps({"study": study.study_name, **result, "ppl_after_generation": by_generation(study)}))


if __name__ == "__main__":
    main()
