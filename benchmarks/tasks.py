"""How long the tasks take, and how near the dense model's accuracy is to published figures.

    python benchmarks/tasks.py [--limit 100] [--device cpu] [--dtype float32] [--tasks hellaswag piqa]

Asks SmolLM2-135M-Instruct, dense, every task of ``tasks=core`` and prints Markdown: accuracy with its standard error,
seconds, published accuracy. Reading the questions is not in the seconds, the first download neither. ``--limit 0`` asks
every question. Published are the zero-shot figures of lm-evaluation-harness for this model, as the card of
huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion gives them (acc_norm; ARC-Easy: acc).

What differs from them: the model here was dequantized from 4 bits (Q4_1), and the prompts are those of OLMo's
evaluation. With a limit, the first questions are asked, which is another sample.
"""

import argparse
import platform
import time
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from evosweep.core.events import Silent
from evosweep.evaluate.tasks.accuracy import Accuracy
from evosweep.evaluate.tasks.library import LIBRARY
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.models.load import ModelSource

PUBLISHED = {"hellaswag": 42.99, "piqa": 66.92, "arc_easy": 54.12, "arc_challenge": 27.73}


def smollm2(**changes: str) -> ModelSource:
    """Return the model of ``model=smollm2``, with other settings."""
    settings = OmegaConf.load(Path(__file__).parents[1] / "conf" / "model" / "smollm2.yaml")
    return instantiate(OmegaConf.merge(settings, changes))  # type: ignore[no-any-return]


def line(name: str, found: Accuracy, seconds: float) -> str:
    """Return a line of the table."""
    published = f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else ""
    accuracy = f"{100 * found.mean:.1f} ± {100 * found.error:.1f}"
    return f"| {name} | {len(found.correct)} | {accuracy} | {seconds:.1f} | {published} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", default=list(LIBRARY))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = parser.parse_args()
    loaded = smollm2(device=options.device, dtype=options.dtype).load(progress=Silent())
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {options.device}\n")
    print("| task | questions | accuracy, % | seconds | published |\n|---|---|---|---|---|")
    total = 0.0
    for name in options.tasks:
        tasks = Tasks(names=[name], limit=options.limit or None, batch_tokens=options.batch_tokens)
        tasks.questions()
        began = time.monotonic()
        (found,) = tasks.ask_model(loaded.model, tokenizer=loaded.tokenizer).values()
        seconds = time.monotonic() - began
        total += seconds
        print(line(name, found, seconds), flush=True)
    print(f"\nall: {total:.0f} s")


if __name__ == "__main__":
    main()
