"""Milliseconds of a layer at each of its levels, as the table that objective.latency reads.

    python benchmarks/layer_latency.py --out latency.json [--device cuda] [--tokens 1] [--repeats 30] [overrides]

Overrides are those of evosweep and name model and compressor. For every kind of layer (``self_attn.q_proj``) a payload
of the store is decoded and multiplied with so many tokens, at every level: what PyTorch does with the packed export. An
engine's own kernels take another time: write their figures into a file of the same form, ``{"milliseconds":
{"self_attn.q_proj": {"3bit": 0.012}}}``.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.mq_bench import configured
from evosweep.cli.job import materials_of, quiet_libraries, shared_progress
from evosweep.core.errors import EvosweepError
from evosweep.core.files import write_json
from evosweep.core.latency import MILLISECONDS
from evosweep.store.manifest import Stored
from evosweep.workbench import Workbench, open_bench

WARM_UP = 3


def measured(stored: Stored, inputs: torch.Tensor, repeats: int) -> float:
    """Return the median milliseconds of decoding a level and applying it to inputs.

    Args:
        stored: The level.
        inputs: Shape (tokens, width).
        repeats: Calls that are timed.
    """
    device = inputs.device
    tensors = {path: tensor.to(device) for path, tensor in stored.tensors().items()}
    times = []
    for _ in range(WARM_UP + repeats):
        payload = stored.assemble(tensors)  # its weight is kept once decoded: a fresh one for every call
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        payload.function(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[WARM_UP:]))


@torch.inference_mode()
def table(bench: Workbench, *, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return kind of layer -> level -> milliseconds.

    Args:
        bench: The model and its levels.
        tokens: Multiplied at once.
        repeats: Calls that are timed.
    """
    found: dict[str, dict[str, float]] = {}
    for unit in bench.store.units:
        if unit.kind in found or unit.gates or unit.only_drops:
            continue
        width = bench.store.weight(unit.name, unit.levels[0].name).shape[1]
        inputs = torch.randn(tokens, width, device=bench.anatomy.device, dtype=bench.anatomy.dtype)
        found[unit.kind] = {
            level.name: round(measured(bench.store.payload(unit.name, level.name), inputs, repeats), 6)
            for level in unit.levels
        }
    return found


def main() -> None:
    """Measure, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    options, overrides = parser.parse_known_args()
    quiet_libraries()
    try:
        config = configured(overrides)
        config.model.device = options.device
        bench = open_bench(materials_of(config), progress=shared_progress())
        found = table(bench, tokens=options.tokens, repeats=options.repeats)
    except EvosweepError as error:
        sys.exit(str(error))
    facts = {"model": bench.loaded.name, "device": str(bench.anatomy.device), "tokens": options.tokens}
    write_json(options.out, {**facts, MILLISECONDS: found})
    for kind, levels in found.items():
        print(kind, ", ".join(f"{level} {value:.4f}" for level, value in levels.items()))


if __name__ == "__main__":
    main()
