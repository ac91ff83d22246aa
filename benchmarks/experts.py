"""Tokens per second of building a store and of scoring a population: a mixture of experts, and a dense model.

Both are random. The mixture has Mixtral's shape at a chosen scale; the dense model has as many active weights: its MLP
is as wide as the experts that a token goes to together. At full width, cut to 8 blocks, on a GPU:

python benchmarks/experts.py --hidden 4096 --intermediate 14336 --layers 8 --device cuda --dtype bfloat16 \\
    --seq-len 1024 --calibration 32 --windows 8

Prints a line of JSON for every block of a store and every round of scoring, so that a run that is cut off tells what it
has measured, and all figures at the end: tokens a second of the store (calibration tokens), and of the search
(candidates times tokens), by model. A GPTQ store that would take more than its share of ``--seconds`` is given up after
some blocks, its speed is that of these, and levels rounded to nearest are scored instead: they decode alike.

By arithmetic that takes some 65 GB of the GPU: 23 GB of weights; of one block, second moments 7 GB, fp32 weights 6 GB,
levels 15 GB, what is passed on 6 GB; matrices of one expert at three levels 8 GB. Also 15 GB of disk.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.budget import Budget
from evosweep.core.events import Silent
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.search.moves import random_feasible
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units

HEAD = 64  # width of an attention head, where that divides
SHARES = {"mixture": 0.6, "dense": 0.4}  # of the time that each model has ...
GPTQ_SHARE = 0.6  # ... and of that its store


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
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seconds", type=float, default=240, help="that both models may take together, about")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(arguments)


def model_of(given: argparse.Namespace, *, dense: bool) -> torch.nn.Module:
    """Return a random Mixtral, or a Mistral with as many active weights, made on the device in its type."""
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


class OutOfTime(Exception):
    """Ends a store that would take too long."""


@dataclass
class Blocks(Silent):
    """Progress that prints the seconds of every block of a store, and ends it where the next would come too late.

    Attributes:
        clock: Of the model.
        least: When a store must be done, in seconds from the start.
        seconds: Of each block.
    """

    clock: "Clock"
    least: float
    seconds: list[float] = field(default_factory=list)

    def track(self, items: Sequence[Any], *, description: str, tokens: int | None = None) -> Iterator[Any]:
        """Yield ``items``, as long as there is time; arguments as for ``Silent``.

        Raises:
            OutOfTime: What is left would come too late.
        """
        del tokens
        for index, item in enumerate(items):
            if self.seconds and self.clock.spent + np.mean(self.seconds) * (len(items) - index) > self.least:
                raise OutOfTime
            start = self.clock.spent
            yield item
            self.seconds.append(self.clock.spent - start)
            self.clock.tell(phase=description, block=index, seconds=round(self.seconds[-1], 2))


@dataclass
class Clock:
    """Time and memory of one model, and its lines.

    Attributes:
        name: Of the model.
        device: Where it is.
        limit: Seconds that it may take.
        start: When it began.
    """

    name: str
    device: str
    limit: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds so far, what the device still has to do included."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - self.start

    def tell(self, **values: Any) -> None:
        """Print values as a line of JSON."""
        memory = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)} if self.device != "cpu" else {}
        print(json.dumps({"model": self.name, "at": round(self.spent, 1), **values, **memory}), flush=True)


def generation(problem: Problem, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return a random allocation, and candidates that differ from it in two units each, as in a generation."""
    parent: Genome = random_feasible(problem, rng)
    genomes = np.repeat(parent[None], count, axis=0)
    for genome in genomes[1:]:
        chosen = rng.choice(len(parent), size=min(2, len(parent)), replace=False)
        genome[chosen] = rng.integers(0, problem.sizes[chosen])
    return genomes


def store_of(
    anatomy: Anatomy, given: argparse.Namespace, calibration: TokenSplit, clock: Clock
) -> tuple[LevelStore, dict[str, Any]]:
    """Return a store to score with, and the figures of a GPTQ store.

    Args:
        anatomy: The model.
        given: Of the command line.
        calibration: Token windows.
        clock: Of the model.
    """
    blocks = Blocks(clock, GPTQ_SHARE * clock.limit)
    plan = plan_store(anatomy, GPTQ(bits=given.bits, group=given.group))
    store = None
    with suppress(OutOfTime):
        store = StoreBuilder().open(plan, calibration, model_name=clock.name, progress=blocks)
    scored = "rtn" if store is None else "gptq"
    if store is None:  # behind the error, which holds what it was working on
        plan = plan_store(anatomy, RoundToNearest(bits=given.bits, group=given.group))
        store = StoreBuilder(layer_errors=False).open(plan, calibration, model_name=clock.name)
    seconds = float(np.mean(blocks.seconds)) * given.layers
    found = {
        "store_seconds": round(seconds, 2),
        "store_blocks": len(blocks.seconds),
        "store_tokens_per_second": round(calibration.tokens / seconds, 1),
        "store_weights_per_second": round(sum(slot.read().numel() for slot in anatomy.slots) / seconds),
        "scored": scored,
    }
    clock.tell(**found)
    return store, found


def searched(
    anatomy: Anatomy, store: LevelStore, splits: Mapping[str, TokenSplit], given: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """Return the figures of scoring populations.

    Args:
        anatomy: The model.
        store: Its levels.
        splits: Token windows.
        given: Of the command line.
        clock: Of the model.
    """
    tied = Units().tied(store.units, anatomy, common=True)
    problem = Budget(as_uniform=min(given.bits, key=lambda bits: abs(bits - 3))).problem(
        tied, fixed_bits=store.fixed_bits
    )
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits, units=tied)
    rng = generator(0, "generations")
    rounds: list[float] = []
    for number in range(given.rounds + 1):  # the first compiles, reads levels, keeps the dense model's outputs
        genomes = generation(problem, rng, given.candidates)
        start = clock.spent
        evaluator.score(genomes, split="search", windows=list(range(given.windows)), fitness=[KL()])
        rounds.append(clock.spent - start)
        clock.tell(phase="scoring", round=number, seconds=round(rounds[-1], 3), packed=evaluator.plan.packed)
        if number and clock.spent + rounds[-1] > clock.limit:
            break
    tokens = given.candidates * given.windows * given.seq_len
    later = sorted(rounds[1:])
    return {
        "units": len(problem.units),
        "packed_levels_in": evaluator.plan.packed,
        "search_tokens_per_second": round(tokens / later[len(later) // 2], 1),
    }


def measured(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the figures of one of the two models."""
    clock = Clock(name, given.device, SHARES[name] * given.seconds)
    anatomy = Anatomy(model_of(given, dense=name == "dense"))
    clock.tell(phase="model")
    rng = generator(0, "benchmark")
    counts = {"calibration": given.calibration, "search": given.windows, "validation": 1}
    splits = {
        split: TokenSplit(split, rng.integers(0, given.vocabulary, (windows, given.seq_len)), ("random",))
        for split, windows in counts.items()
    }
    store, figures = store_of(anatomy, given, splits["calibration"], clock)
    weights = {
        "weights": sum(slot.shape[0] * slot.shape[1] for slot in anatomy.slots),
        "active_weights": int(sum(unit.active.numel for unit in store.units)),
    }
    figures = {**weights, **figures, **searched(anatomy, store, splits, given, clock)}
    clock.tell(**figures)
    return figures


def main() -> None:
    """Print the figures of both models as JSON."""
    given = options()
    result = {}
    for name in SHARES:
        with tempfile.TemporaryDirectory() as folder:  # one store at a time: both may not fit the disk
            os.environ["EVOSWEEP_CACHE"] = str(Path(folder))
            result[name] = measured(given, name)
        gc.collect()
        if given.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(json.dumps({"options": vars(given), "result": result}, indent=1))


if __name__ == "__main__":
    main()
