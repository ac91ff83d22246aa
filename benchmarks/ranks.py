"""How much faster several processes are than one, for the level store, a measurement and the search.

    python benchmarks/ranks.py                                             # CPU, one thread a process
    python benchmarks/ranks.py --shape llama7b --device cuda --processes 1 2   # one card, then two, through NCCL
    python benchmarks/ranks.py --check                                     # and compares what they find on one store

Runs the command line itself, as torchrun would start it, with random weights in the shape of SmolLM2-135M or Llama-7B
(--blocks, --vocabulary: a part of it, as on a CPU by default) and random words, each number of processes with a cache
of its own, --repeat times in turn; the shortest times count. Loading the model and the text is left out. --check: the
same search once more with the most processes on the store of the fewest, which must find the same allocation, losses
and validation figures.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from evosweep.core.results import read_result

SHAPES = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
CPU = {
    "blocks": 4,
    "vocabulary": 2048,
    "seq_len": 256,
    "calibration": 8192,
    "stages": [(4, 512), (1, 2048)],
    "offspring": 16,
}
CUDA = {
    "blocks": None,
    "vocabulary": None,
    "seq_len": 2048,
    "calibration": 262144,
    "stages": [(8, 2048), (2, 16384), (1, 65536)],
}
CUDA["offspring"] = 64


def write_words(folder: Path, tokens: int) -> Path:
    """Write random words, a byte a token, four times as many as all splits take."""
    rng = np.random.default_rng(0)
    path = folder / "words.jsonl"
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      "))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(64, tokens // 4096)):
            file.write(json.dumps({"text": "".join(rng.choice(letters, 16384))}) + "\n")
    return path


def settings(options: argparse.Namespace, words: Path) -> list[str]:
    """Return the overrides of the command."""
    shape = dict(SHAPES[options.shape], max_position_embeddings=max(2048, options.seq_len))
    if options.vocabulary is not None:
        shape["vocab_size"] = options.vocabulary
    if options.blocks is not None:
        shape["num_hidden_layers"] = options.blocks
    stages = ",".join(f"{{survivors:{survivors},tokens:{tokens}}}" for survivors, tokens in options.stages)
    return [
        "model=tiny",
        f"model.name={options.shape}",
        *(f"{'' if key in TINY else '+'}model.config.{key}={str(value).lower()}" for key, value in shape.items()),
        f"model.spread={0.5 / shape['hidden_size'] ** 0.5:.4f}",
        f"model.dtype={options.dtype}",
        f"model.device={options.device}",
        "data=text",
        f"data.path={words}",
        f"tokens.seq_len={options.seq_len}",
        f"tokens.calibration={options.calibration}",
        f"tokens.validation={16 * options.seq_len}",
        "tokens.shares={validation: 0.1, search: 0.3, calibration: 0.6}",
        f"compressor={options.compressor}",
        f"sampler={options.sampler}",
        f"search.offspring={options.offspring}",
        f"search.generations={options.generations}",
        f"search.stages=[{stages}]",
        f"evaluate.sensitivity_tokens={2 * options.seq_len}",
        *([] if options.memory_gb is None else [f"evaluate.memory_gb={options.memory_gb}"]),
        "tracking=none",
        "report=none",
        "export=none",
        "storage=memory",
    ]


TINY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)  # that conf/model/tiny.yaml has


def run(folder: Path, name: str, count: int, overrides: list[str], cache: Path) -> dict[str, object]:
    """Run the command in several processes; return the row of its result."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    common = {**os.environ, "EVOSWEEP_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}
    common.setdefault("OMP_NUM_THREADS", "1")
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    processes = []
    for rank in range(count):
        environment = {**common, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else common
        command = [sys.executable, "-m", "evosweep", *overrides, f"name={name}"]
        shown = None if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=shown))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{name}: exit codes {codes}")
    (path,) = folder.glob(f"runs/{name}/*/result.json")
    return {**read_result(path), "history": None, "found": found(path.parent)}


def found(folder: Path) -> object:
    """Return everything that a search found, but for times."""
    lines = [json.loads(line) for line in (folder / "search_state.jsonl").read_text().splitlines()[1:]]
    return [{key: line[key] for key in ("elite", "candidates", "tokens", "validation")} for line in lines]


def main() -> None:
    """Print times and speedups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compressor", default="gptq")
    parser.add_argument("--sampler", default="evopress_ilp_scaled")
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--memory-gb", type=float)
    for name in ("blocks", "vocabulary", "seq-len", "calibration", "offspring"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    defaults = CPU if options.device == "cpu" else CUDA
    options.stages = defaults["stages"]
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    for name in ("blocks", "vocabulary", "seq_len", "calibration", "offspring"):
        if getattr(options, name) is None:
            setattr(options, name, defaults[name])
    with tempfile.TemporaryDirectory() as name:
        report(options, Path(name))


def report(options: argparse.Namespace, folder: Path) -> None:
    """Run all numbers of processes in turn and print a table."""
    overrides = settings(options, write_words(folder, options.calibration))
    times: dict[int, dict[str, float]] = {}
    rows: dict[int, dict[str, object]] = {}
    for turn in range(options.repeat):
        for count in options.processes:
            shutil.rmtree(folder / f"cache{count}", ignore_errors=True)
            rows[count] = run(folder, f"r{turn}of{count}", count, overrides, folder / f"cache{count}")
            phases = dict(rows[count]["phases"], search=rows[count]["seconds"])  # type: ignore[call-overload]
            best = times.setdefault(count, phases)
            times[count] = {phase: min(best[phase], seconds) for phase, seconds in phases.items()}
    first = options.processes[0]
    print(f"{options.shape}, {options.blocks or 'all'} blocks, {options.device}, {options.dtype}")
    for phase in ("store", "sensitivities", "dense", "search"):
        if phase in times[first]:
            base = times[first][phase]
            shown = ", ".join(f"{n}: {times[n][phase]:.2f} s ({base / times[n][phase]:.2f}x)" for n in times)
            print(f"{phase:>14} {shown}")
    if options.check:
        most = max(options.processes)
        shutil.rmtree(folder / f"cache{first}" / "columns", ignore_errors=True)
        again = run(folder, "check", most, overrides, folder / f"cache{first}")
        same = again["found"] == rows[first]["found"]
        print(f"{most} processes on the store of {first}: {'identical' if same else 'NOT identical'}")


if __name__ == "__main__":
    main()
