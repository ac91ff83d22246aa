"""Time and memory of a model that stays in host memory: loading, a level store, and a generation of scoring.

A random model in Llama-13B's shape is written as safetensors, a file a block, and loaded with model.offload=true: its
blocks stay in host memory, and each visits the device while it runs. The store has levels of the first --blocks blocks;
candidates are scored through all blocks. On one GPU of 80 GB, 128 GB of host memory and 30 GB of disk:

    python benchmarks/offload.py [--blocks 4] [--folder /somewhere/with/room]
    python benchmarks/offload.py --hidden 256 --intermediate 512 --layers 6 --seq-len 128 --calibration 8   # on a CPU

Prints a line of JSON when a phase is done: its seconds; host_peak_gb, the most resident memory of the process in it,
files that are mapped included, and host_own_peak_gb without those; pinned_peak_gb, the most page-locked memory so far;
device_peak_gb; tokens a second. What is not done after --seconds is given up, and the last line says in which phase.
"""

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from safetensors.torch import save_file

from evosweep.compressors.gptq import GPTQ
from evosweep.core.budget import Budget
from evosweep.core.events import Silent
from evosweep.core.problem import Genome, Problem
from evosweep.core.seeds import generator
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import HuggingFace, byte_tokenizer
from evosweep.search.moves import random_feasible
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.store.units import Units

HEAD = 128  # width of an attention head
BITS = [2, 3, 4, 5, 6]
SPREAD = 0.02  # standard deviation of the weights
OTHERS = "others"  # what is in no block
WATCHED = 0.02  # seconds between two looks at the process's memory


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "hidden": 5120,
        "intermediate": 13824,
        "layers": 40,
        "vocabulary": 32000,
        "blocks": 4,
        "group": 64,
        "seq-len": 2048,
        "calibration": 64,
        "windows": 4,
        "candidates": 16,
        "seconds": 300,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the model and the store are written, and removed again")
    return parser.parse_args(arguments)


class OutOfTimeError(BaseException):
    """The time is over; no error that the product explains."""


class Memory:
    """The most memory that this process holds, looked at from a thread of its own while the context lasts."""

    def __init__(self) -> None:
        self.resident = 0
        self.own = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            found = process.memory_info()
            self.resident = max(self.resident, found.rss)
            self.own = max(self.own, found.rss - getattr(found, "shared", 0))
            if self._done.wait(WATCHED):
                return


@contextmanager
def phase(name: str) -> Iterator[dict[str, Any]]:
    """Print a line of JSON on what is done inside; what the dictionary is given stands in it, too."""
    facts: dict[str, Any] = {}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    line: dict[str, Any] = {"phase": name}
    with Memory() as memory:
        try:
            yield facts
            if gpu:
                torch.cuda.synchronize()
        except BaseException as error:
            line["given_up"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            line["seconds"] = round(time.perf_counter() - began, 2)
            tokens = facts.pop("tokens", None)
            line |= {"host_peak_gb": round(memory.resident / 1e9, 2), "host_own_peak_gb": round(memory.own / 1e9, 2)}
            if gpu:
                pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
                line["pinned_peak_gb"] = round(pinned / 1e9, 2)
                line["device_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if tokens:
                line["tokens_per_second"] = round(tokens / line["seconds"], 1)
            print(json.dumps(line | facts), flush=True)


def write_model(given: argparse.Namespace, folder: Path, device: str) -> int:
    """Write a random Llama in bfloat16, a file for each block and one for the rest; return its bytes.

    Args:
        given: The arguments of the command line.
        folder: Where to.
        device: Makes the random numbers.
    """
    heads = max(1, given.hidden // HEAD)
    config = transformers.LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        max_position_embeddings=given.seq_len,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        sketch = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in sketch.named_parameters():
        block = name.split(".")[2] if ".layers." in name else OTHERS
        parts.setdefault(block, {})[name] = parameter.shape
    draws = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    size = 0
    for block, shapes in parts.items():
        tensors = {name: _drawn(shape, draws) for name, shape in shapes.items()}
        file = f"model-{block}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return size


def _drawn(shape: torch.Size, draws: torch.Generator) -> torch.Tensor:
    """Return a random weight in host memory; a gain is one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (SPREAD * torch.randn(shape, generator=draws, device=draws.device, dtype=torch.bfloat16)).cpu()


def generation(problem: Problem, count: int) -> np.ndarray:
    """Return a random allocation, and candidates that differ from it in two units each, as in a generation."""
    rng = generator(0, "benchmark")
    parent: Genome = random_feasible(problem, rng)
    genomes = np.repeat(parent[None], count, axis=0)
    for genome in genomes[1:]:
        chosen = rng.choice(len(parent), size=2, replace=False)
        genome[chosen] = rng.integers(0, problem.sizes[chosen])
    return genomes


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Run all phases and print their lines."""
    source = HuggingFace(path=str(folder), dtype="bfloat16", device=given.device, offload=True)
    with phase("write") as facts:
        size = write_model(given, folder, str(source.device))
        facts["gigabytes"] = round(size / 1e9, 2)
    with phase("load"):
        loaded = source.load(progress=Silent())
    with phase("prove") as facts:  # blocks one by one give what the model gives
        anatomy = Anatomy(loaded.model)
        facts["device"] = str(anatomy.device)
    rng = generator(0, "benchmark tokens")
    counts = {"calibration": given.calibration, "search": given.windows, "validation": 1}
    splits = {
        name: TokenSplit(name, rng.integers(0, given.vocabulary, (windows, given.seq_len)), ("random",))
        for name, windows in counts.items()
    }
    left = [f"model.layers.{block}.*" for block in range(given.blocks, given.layers)]
    with phase("store") as facts:
        plan = plan_store(anatomy, GPTQ(bits=BITS, group=given.group), units=Units(exclude=left, coverage=0))
        store = StoreBuilder().open(plan, splits["calibration"], model_name="offload")
        facts |= {
            "tokens": splits["calibration"].tokens,
            "blocks": given.blocks,
            "store_gb": round(store.size / 1e9, 3),
        }
    problem = Budget(as_uniform=3).problem(store.units, fixed_bits=store.fixed_bits)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits=splits)
    windows = list(range(given.windows))
    with phase("dense") as facts:  # what candidates are compared with
        evaluator.score(generation(problem, 1), split="search", windows=windows, fitness=[KL()])
        facts["tokens"] = 2 * splits["search"].tokens  # one candidate is scored in this, too
    with phase("generation") as facts:
        found = evaluator.score(generation(problem, given.candidates), split="search", windows=windows, fitness=[KL()])
        facts |= {"tokens": given.candidates * splits["search"].tokens, "candidates": given.candidates}
        facts["kl"] = round(float(found["kl"].mean()), 4)


def _give_up(number: int, frame: object) -> None:
    del number, frame
    raise OutOfTimeError("longer than --seconds")


def main() -> None:
    """Print the lines of all phases, or of those that were done in time."""
    given = options()
    if not 1 <= given.blocks <= given.layers:
        raise SystemExit(f"--blocks must be 1 to {given.layers}, the number of --layers")
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(given.seconds)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        os.environ["EVOSWEEP_CACHE"] = str(folder / "cache")
        (folder / "model").mkdir()
        free = shutil.disk_usage(folder).free / 1e9
        memory = psutil.virtual_memory().available / 1e9
        line = {"phase": "begin", **vars(given), "disk_free_gb": round(free, 1), "memory_free_gb": round(memory, 1)}
        print(json.dumps(line), flush=True)
        try:
            measure(given, folder / "model")
        except OutOfTimeError as error:  # its phase has been printed
            raise SystemExit(f"given up: {error}={given.seconds}") from None


if __name__ == "__main__":
    main()
