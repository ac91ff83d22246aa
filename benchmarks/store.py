"""Time and size of a level store, beside a plain loop over layers and levels, in one run.

    python benchmarks/store.py [--blocks 3] [--calibration 8192] [--seq-len 512] [--device cuda] [--dtype float32]
    python benchmarks/store.py --shape 7b --device cuda --dtype bfloat16 --calibration 131072 --seq-len 2048

The plain loop is how GPTQ is usually run for several bit-widths: every linear layer sums its own Hessian, every
(layer, level) factorizes it and runs its own column loop, lazily in blocks of 128 columns, and a dense fp16 copy of the
result goes to disk. Both work on the model's first blocks, on the same tokens. The codes of the first block are
compared; from the second on, another last bit in an input makes other codes.

--shape 7b: time and peak memory of our store alone, for random weights in Llama-7B's shape, first --blocks blocks.
--levels: a choice of conf/levels instead of plain GPTQ, timed alone as with --whole.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.nn import functional

from evosweep.cli.main import CONF
from evosweep.compressors.base import Compressor
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.grid import Grid
from evosweep.core.events import Silent
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.data.wikipedia import Wikipedia
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import tf32
from evosweep.models.dropping import without_blocks
from evosweep.models.load import LoadedModel, ModelSource
from evosweep.models.patch import replaced_weights
from evosweep.models.slots import Slot
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore
from evosweep.store.store_plan import plan_store
from evosweep.tracking.console import RichProgress

BITS, GROUP, DAMPING, LAZY, PROPAGATE = (2, 3, 4, 5, 6), 64, 0.01, 128, 3


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """Return one layer at one width, dequantized; GPTQ's Algorithm 1, one column at a time."""
    left, damped = weight.clone(), hessian.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    top = torch.full((len(left),), 2.0**bits - 1, device=left.device)
    result = torch.empty_like(left)
    for start in range(0, left.shape[1], LAZY):
        stop = min(start + LAZY, left.shape[1])
        part, errors = left[:, start:stop].clone(), torch.zeros_like(left[:, start:stop])
        for column in range(stop - start):
            if (start + column) % GROUP == 0:
                grid = Grid.of(part[:, column : column + GROUP], top=top, symmetric=False)
            codes = torch.clamp(torch.round(part[:, column] / grid.scale + grid.zero), min=0).minimum(top)
            result[:, start + column] = (codes - grid.zero) * grid.scale
            errors[:, column] = (part[:, column] - result[:, start + column]) / upper[start + column, start + column]
            part[:, column:] -= errors[:, column, None] * upper[start + column, start + column : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def plain_store(anatomy: Anatomy, split: TokenSplit, folder: Path, batch: int) -> dict[str, torch.Tensor]:
    """Write dense fp16 copies of every (layer, level); return those of one level."""
    tokens = torch.from_numpy(split.windows).to(anatomy.device)
    hidden = [anatomy.embed(part) for part in tokens.split(max(1, batch // split.seq_len))]
    shown: dict[str, torch.Tensor] = {}
    for block in range(len(anatomy.blocks)):
        slots = anatomy.slots_of(block)
        hessians = {slot.name: torch.zeros(2 * (slot.shape[1],), device=anatomy.device) for slot in slots}
        handles = [slot.module.register_forward_pre_hook(partial(_add, hessians[slot.name])) for slot in slots]
        for part in hidden:
            anatomy.run_block(block, part)
        for handle in handles:
            handle.remove()
        for slot in slots:
            for bits in BITS:
                made = plain_gptq(slot.read().float(), hessians[slot.name] / split.tokens, bits)
                save_file({"weight": made.half().cpu().contiguous()}, folder / f"{slot.name}.{bits}.safetensors")
                if bits == PROPAGATE:
                    shown[slot.name] = made
        with replaced_weights(slots, shown):
            hidden = [anatomy.run_block(block, part) for part in hidden]
    return shown


def _add(hessian: torch.Tensor, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    del module
    rows = functional.normalize(inputs[0].flatten(0, -2).float(), dim=1)  # tokens weighted as evosweep's store does
    with tf32(allowed=True):  # as it does, too
        hessian.addmm_(rows.T, rows)


def agreement(store: LevelStore, plain: dict[str, torch.Tensor], slots: list[Slot]) -> float:
    """Return the share of weights that both gave the same value at one level."""
    same, count = 0, 0
    for slot in slots:
        ours = store.weight(slot.name, f"{PROPAGATE}bit", device=plain[slot.name].device)
        same += int(torch.isclose(ours, plain[slot.name], rtol=1e-3, atol=1e-6).sum())
        count += ours.numel()
    return same / count


def load(device: str, dtype: str) -> LoadedModel:
    """Return SmolLM2, as model=smollm2 does."""
    settings = OmegaConf.load(CONF / "model" / "smollm2.yaml")
    source: ModelSource = instantiate(settings, device=device, dtype=dtype)
    return source.load(progress=Silent())


def shaped(device: str, dtype: str, blocks: int) -> torch.nn.Module:
    """Return random weights in Llama-7B's shape, with SmolLM2's vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=["smollm2", "7b"], default="smollm2")
    parser.add_argument("--whole", action="store_true", help="also time the store of all blocks")
    parser.add_argument("--levels", help="a choice of conf/levels")
    options = parser.parse_args()
    model = load(options.device, options.dtype)
    windows = Windows(
        seq_len=options.seq_len,
        calibration=options.calibration,
        validation=options.seq_len,
        shares={"validation": 0.06, "search": 0.10, "calibration": 0.84},
    )
    split = windows.split(Wikipedia(), model.tokenizer)["calibration"]
    large = options.shape == "7b"
    anatomy = Anatomy(shaped(options.device, options.dtype, options.blocks) if large else model.model)
    facts: dict[str, object] = vars(options).copy()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVOSWEEP_CACHE"] = folder
        if options.whole or large or options.levels:
            compressor = stack(options.levels) if options.levels else None
            facts["whole_seconds"], whole = _timed(lambda: _ours(anatomy, split, options.batch_tokens, compressor))
            facts["whole_mb"] = whole.size / 1e6
            shutil.rmtree(whole.folder)
        if not large and not options.levels:
            facts |= compared(anatomy, split, Path(folder), options.blocks, options.batch_tokens)
    if options.device != "cpu":
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(facts, indent=1))


def compared(anatomy: Anatomy, split: TokenSplit, folder: Path, blocks: int, batch: int) -> dict[str, object]:
    """Build the store of the first blocks both ways."""
    with without_blocks(anatomy, set(range(blocks, len(anatomy.blocks)))):
        few = Anatomy(anatomy.model)
        StoreBuilder(batch_tokens=batch).open(plan_store(few, GPTQ(bits=[2], group=GROUP)), split, model_name="warm-up")
        seconds, store = _timed(lambda: _ours(few, split, batch))
        copies = folder / "plain"
        copies.mkdir()
        plain_seconds, plain = _timed(lambda: plain_store(few, split, copies, batch))
        dense = sum(path.stat().st_size for path in copies.iterdir())
        return {
            "seconds": seconds,
            "plain_seconds": plain_seconds,
            "ratio": plain_seconds / seconds,
            "same": agreement(store, plain, few.slots_of(0)),
            "mb": store.size / 1e6,
            "plain_mb": dense / 1e6,
            "size_ratio": store.size / dense,
        }


def stack(name: str) -> Compressor:
    """Return the compressor of a choice of conf/levels."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compressor: Compressor = instantiate(compose("config", overrides=[f"levels={name}"]).compressor)
    return compressor


def _ours(anatomy: Anatomy, split: TokenSplit, batch: int, compressor: Compressor | None = None) -> LevelStore:
    builder = StoreBuilder(propagate=PROPAGATE, batch_tokens=batch)
    compressor = compressor or GPTQ(bits=BITS, group=GROUP, damping=DAMPING)
    return builder.open(plan_store(anatomy, compressor), split, model_name="ours", progress=RichProgress())


def _timed(work):  # type: ignore[no-untyped-def]
    began = time.monotonic()
    with torch.no_grad():
        result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began, result


if __name__ == "__main__":
    main()
