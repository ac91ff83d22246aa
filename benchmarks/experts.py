"""Tokens per second of building a store and of scoring a population: a mixture of experts, and a dense model.

Both are random. The mixture has Mixtral's shape at a chosen scale; the dense model has as many active weights: its MLP
is as wide as the experts that a token goes to together. At full width, cut to 8 blocks, on a GPU:

python benchmarks/experts.py --hidden 4096 --intermediate 14336 --layers 8 --device cuda --dtype bfloat16

Prints JSON: tokens a second of the store (calibration tokens), and of the search (candidates times tokens), by model.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.search.moves import random_feasible
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units

HEAD = 64  # width of an attention head, where that divides
BITS = [2, 3, 4]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "hidden": 256,
        "intermediate": 512,
        "layers": 2,
        "experts": 8,
        "active": 2,
        "vocabulary": 2048,
        "group": 64,
        "seq-len": 256,
        "calibration": 16,
        "windows": 4,
        "candidates": 16,
        "rounds": 3,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


def model_of(given: argparse.Namespace, *, dense: bool) -> torch.nn.Module:
    """Return a random Mixtral, or a Mistral with as many active weights."""
    heads = max(1, given.hidden // HEAD)
    sizes: dict[str, Any] = {
        "vocab_size": given.vocabulary,
        "hidden_size": given.hidden,
        "num_hidden_layers": given.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": given.seq_len,
    }
    if dense:
        config: Any = transformers.MistralConfig(**sizes, intermediate_size=given.active * given.intermediate)
    else:
        config = transformers.MixtralConfig(
            **sizes,
            intermediate_size=given.intermediate,
            num_local_experts=given.experts,
            num_experts_per_tok=given.active,
        )
    torch.manual_seed(0)
    with torch.device(given.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype)).eval()


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return the seconds that a function takes, and what it returns."""
    start = time.perf_counter()
    found = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def generation(problem: Problem, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return a random allocation, and candidates that differ from it in two units each, as in a generation."""
    parent: Genome = random_feasible(problem, rng)
    genomes = np.repeat(parent[None], count, axis=0)
    for genome in genomes[1:]:
        chosen = rng.choice(len(parent), size=min(2, len(parent)), replace=False)
        genome[chosen] = rng.integers(0, problem.sizes[chosen])
    return genomes


def measured(given: argparse.Namespace, *, dense: bool) -> dict[str, float]:
    """Return the figures of one of the two models."""
    anatomy = Anatomy(model_of(given, dense=dense))
    rng = generator(0, "benchmark")
    counts = {"calibration": given.calibration, "search": given.windows, "validation": 1}
    splits = {
        name: TokenSplit(name, rng.integers(0, given.vocabulary, (windows, given.seq_len)), ("random",))
        for name, windows in counts.items()
    }
    plan = plan_store(anatomy, GPTQ(bits=BITS, group=given.group))
    name = "dense" if dense else "mixture"
    seconds, store = timed(lambda: StoreBuilder().open(plan, splits["calibration"], model_name=name), given.device)
    tied = Units().tied(store.units, anatomy, common=True)
    problem = Budget(as_uniform=3).problem(tied, fixed_bits=store.fixed_bits)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits, units=tied)
    windows = list(range(given.windows))

    def scored() -> Any:
        genomes = generation(problem, rng, given.candidates)
        return evaluator.score(genomes, split="search", windows=windows, fitness=[KL()])

    scored()  # compiles, decodes levels, keeps the dense model's outputs
    rounds = sorted(timed(scored, given.device)[0] for _ in range(given.rounds))
    tokens = given.candidates * given.windows * given.seq_len
    return {
        "weights": sum(slot.shape[0] * slot.shape[1] for slot in anatomy.slots),
        "active_weights": int(sum(unit.active.numel for unit in store.units)),
        "units": len(problem.units),
        "store_seconds": round(seconds, 2),
        "store_tokens_per_second": round(given.calibration * given.seq_len / seconds, 1),
        "search_tokens_per_second": round(tokens / rounds[len(rounds) // 2], 1),
    }


def main() -> None:
    """Print the figures of both models as JSON."""
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVOSWEEP_CACHE"] = str(Path(folder))
        result = {name: measured(given, dense=name == "dense") for name in ("mixture", "dense")}
    print(json.dumps({"options": vars(given), "result": result}, indent=1))


if __name__ == "__main__":
    main()
