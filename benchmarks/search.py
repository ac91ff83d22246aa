"""How fast a population is scored, beside scoring its candidates one by one.

    python benchmarks/search.py                                                        # CPU: 16 offspring x 512 tokens
    python benchmarks/search.py --device cuda --dtype bfloat16 --offspring 64 --seq-len 2048
    python benchmarks/search.py --device cuda --dtype bfloat16 --offspring 64 --seq-len 2048 --shape 7b --memory-gb 55
    python benchmarks/search.py --device cuda --dtype bfloat16 --seq-len 2048 --grow

Interleaved in one run, the best of --repeat rounds each: our evaluator on a parent's offspring; the same uncompiled,
with every row gathered by level, on random genomes (no common prefix, no majority); candidates one by one with changed
weights from memory (--host: from page-locked host memory), and one by one as reference scripts do it: changed weights
from disk, dense copies, all logits in fp32. --shape 7b: random weights in Llama-7B's shape, every block with the first
block's levels, and our evaluator also with packed levels in host memory. --grow: tokens/s by offspring, by
tokens, and by units (60 to 600, random weights in SmolLM2's shape).
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from evosweep.cli.main import CONF
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.core.unit import Unit
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.data.wikipedia import Wikipedia
from evosweep.evaluate.level_weights import LevelWeights
from evosweep.evaluate.memory import Resources
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import without_blocks
from evosweep.models.load import LoadedModel, ModelSource
from evosweep.models.slots import Slot
from evosweep.search.evolution import EvoPress, RandomSearch
from evosweep.store.build import StoreBuilder
from evosweep.store.manifest import LevelStore, Stored
from evosweep.store.store_plan import plan_store

HOSTED_DENSE = 2e9  # bytes of dequantized weights kept where packed levels are in host memory
DRIFT = 12  # generations that the parent is away from uniform


class Repeated(LevelStore):
    """A store of one block that stands for a model of many such blocks."""

    def __init__(self, folder: Path, blocks: int) -> None:
        super().__init__(folder)
        self.blocks = blocks

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The first block's units, again and again."""
        first = LevelStore(self.folder).units
        return tuple(
            replace(unit, name=unit.name.replace(".0.", f".{block}.", 1), block=block)
            for block in range(self.blocks)
            for unit in first
        )

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return super().size * self.blocks

    def payload(self, unit: str, level: str) -> Stored:
        """Return the first block's."""
        path, _, kind = unit.partition(".layers.")
        return super().payload(f"{path}.layers.0.{kind.partition('.')[2]}", level)


class OneByOne:
    """Candidates one after the other: changed weights copied into the model, all logits, KL from stored logits."""

    def __init__(self, evaluator: Evaluator, fetch: Callable[[int, int], torch.Tensor]) -> None:
        self.evaluator, self.fetch = evaluator, fetch
        self.slots: list[Slot] = evaluator.anatomy.slots
        self.there: list[int | None] = [None] * len(self.slots)
        self.dense = [slot.read().cpu().clone() for slot in self.slots]

    def score(self, genomes: np.ndarray, tokens: torch.Tensor, dense: torch.Tensor) -> list[float]:
        """Return each genome's KL from fp16 ``dense`` logits."""
        scores = []
        for genome in genomes:
            for place, level in enumerate(genome):
                if self.there[place] != level:
                    self.slots[place].write(self.fetch(place, int(level)))
                    self.there[place] = int(level)
            total = 0.0
            for row, target in zip(tokens, dense, strict=True):
                logits = self.evaluator.anatomy.model(input_ids=row[None], use_cache=False).logits[0].float()
                p, q = target.float().log_softmax(-1), logits.log_softmax(-1)
                total += float((p.exp() * (p - q)).sum(-1)[:-1].mean())
            scores.append(total / len(tokens))
        return scores

    def restore(self) -> None:
        """Give the model its dense weights back."""
        for slot, weight in zip(self.slots, self.dense, strict=True):
            slot.write(weight)
        self.there = [None] * len(self.slots)


def load(device: str, dtype: str) -> LoadedModel:
    """Return SmolLM2, as model=smollm2 does."""
    source: ModelSource = instantiate(OmegaConf.load(CONF / "model" / "smollm2.yaml"), device=device, dtype=dtype)
    return source.load(progress=Silent())


def llama_7b(device: str, dtype: str, vocabulary: int) -> torch.nn.Module:
    """Return random weights in Llama-7B's shape."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    return model.requires_grad_(False)


def built(anatomy: Anatomy, split: TokenSplit, *, repeated: bool) -> LevelStore:
    """Return a store of round-to-nearest levels 2-6 in groups of 64."""
    compressor, builder = RoundToNearest(bits=[2, 3, 4, 5, 6], group=64, symmetric=False), StoreBuilder(propagate=None)
    if not repeated:
        return builder.open(plan_store(anatomy, compressor), split, model_name="search")
    blocks = len(anatomy.blocks)
    with without_blocks(anatomy, set(range(1, blocks))):
        store = builder.open(plan_store(Anatomy(anatomy.model), compressor), split, model_name="search")
    return Repeated(store.folder, blocks)


def population(store: LevelStore, offspring: int) -> tuple[np.ndarray, np.ndarray]:
    """Return offspring of a parent some generations away from uniform 3-bit, and as many random genomes."""
    problem = Problem(units=store.units, budget=sum(unit.levels[1].cost for unit in store.units))
    search, parent = EvoPress(problem, seed=0, offspring=offspring), problem.uniform()
    for generation in range(1, DRIFT + 1):
        parent = search.offspring(generation=generation, parents=[parent])[0]
    return (
        np.stack(search.offspring(generation=DRIFT + 1, parents=[parent])),
        np.stack(RandomSearch(problem, seed=0, offspring=offspring).draw(generation=0)),
    )


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def best_of(rounds: int, works: Mapping[str, Callable[[], object]], slow: Sequence[str]) -> dict[str, float]:
    """Return the shortest time of each work, rounds interleaved; the slow ones once, all once before."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            if turn <= 1 or name not in slow:
                times[name].append(seconds(work))
    return {name: min(each[1:]) for name, each in times.items()}


class Bench:
    """Model, store and windows of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        model = load(options.device, options.dtype)
        windows = Windows(
            seq_len=options.seq_len,
            calibration=max(4096, options.seq_len),
            validation=options.seq_len,
            shares={"validation": 0.06, "search": 0.44, "calibration": 0.5},
        )
        self.splits = windows.split(Wikipedia(), model.tokenizer)
        self.large = options.shape == "7b"
        self.small = model.model.config
        if self.large:
            vocabulary = model.model.config.vocab_size
            model = LoadedModel("7b", llama_7b(options.device, options.dtype, vocabulary), model.tokenizer)
        self.anatomy = Anatomy(model.model)
        self.store = built(self.anatomy, self.splits["calibration"], repeated=self.large)

    def evaluator(self, **resources: object) -> Evaluator:
        """Return an evaluator."""
        taken = Resources(**{"memory_gb": self.options.memory_gb, **resources})  # type: ignore[arg-type]
        return Evaluator(anatomy=self.anatomy, store=self.store, splits=self.splits, resources=taken)

    def deep(self, blocks: int) -> Evaluator:
        """Return an evaluator of random weights in SmolLM2's shape with more or fewer blocks, levels all alike."""
        config = copy.deepcopy(self.small)
        config.num_hidden_layers = blocks
        config.layer_types = None
        with torch.device(self.options.device):
            dtype = getattr(torch, self.options.dtype) if self.options.dtype != "auto" else self.anatomy.dtype
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        anatomy = Anatomy(model.requires_grad_(False))
        store = built(anatomy, self.splits["calibration"], repeated=True)
        return Evaluator(anatomy=anatomy, store=store, splits=self.splits, resources=Resources())

    def compare(self) -> dict[str, object]:
        """Return tokens/s of every way."""
        options, windows = self.options, list(range(self.options.windows))
        ours = self.evaluator(compile=False)
        offspring, strangers = population(self.store, options.offspring)
        tokens = torch.from_numpy(self.splits["search"].windows[windows]).to(self.anatomy.device)
        with torch.no_grad():
            logits = [self.anatomy.model(input_ids=row[None], use_cache=False).logits[0].half() for row in tokens]
        dense = torch.stack(logits)
        memory: dict[tuple[int, int], torch.Tensor] = {}

        def kept(place: int, level: int) -> torch.Tensor:
            unit = self.store.units[place]
            if (place, level) not in memory:
                made = self.store.weight(unit.name, unit.levels[level].name, device=self.anatomy.device)
                made = made.to(self.anatomy.dtype)
                memory[place, level] = made.cpu().pin_memory() if options.host else made
            return memory[place, level]

        def score(genomes: np.ndarray, majority: float | None = None) -> np.ndarray:
            ours.majority = majority
            return ours.score(genomes, split="search", windows=windows, fitness=[KL()])["kl"]

        alone = OneByOne(self.evaluator(compile=False), kept)
        few = offspring[: options.alone]
        scored = score(offspring)[: len(few)]  # first: the other way changes the model's weights
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.anatomy.device.type == "cuda" else None
        with torch.no_grad():
            plain = np.array(alone.score(few, tokens, dense))
        difference = float((np.abs(scored - plain) / plain).max())
        alone.restore()
        works: dict[str, Callable[[], object]] = {
            "ours, uncompiled": lambda: score(offspring),
            "ours, every row gathered, uncompiled": lambda: score(offspring, majority=2.0),
            "ours, random genomes, uncompiled": lambda: score(strangers),
            "one by one, weights in memory": lambda: alone.score(few, tokens, dense),
        }
        with tempfile.TemporaryDirectory() as name:
            if self.large:
                far = self.evaluator(compile=False)
                far.levels = LevelWeights(
                    self.store,
                    device=self.anatomy.device,
                    dtype=self.anatomy.dtype,
                    plan=replace(far.plan, packed="host", dense=HOSTED_DENSE),
                )
                works["ours, packed levels in host memory, uncompiled"] = lambda: far.score(
                    offspring, split="search", windows=windows, fitness=[KL()]
                )
            else:
                reference = OneByOne(ours, self.from_disk(Path(name), few, kept))
                works["one by one, weights from disk"] = lambda: reference.score(few, tokens, dense)
            times = best_of(options.repeat, works, [each for each in works if each.startswith("one")])
            alone.restore()
            if self.anatomy.device.type == "cuda":
                memory.clear()
                works.clear()
                ours = self.evaluator(compile=True)
                times |= best_of(options.repeat, {"ours": lambda: score(offspring)}, [])
        each_token = options.windows * options.seq_len
        rates = {
            name: each_token * (len(few) if name.startswith("one") else len(offspring)) / taken
            for name, taken in times.items()
        }
        rates = {"ours": rates["ours, uncompiled"], **rates}
        return {
            "plan": repr(ours.levels.plan),
            "largest difference from one by one, relative": difference,
            "peak_gb": peak,
            "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
            "ratio": {name: round(rates["ours"] / rate, 2) for name, rate in rates.items()},
        }

    def from_disk(
        self, folder: Path, genomes: np.ndarray, made: Callable[[int, int], torch.Tensor]
    ) -> Callable[[int, int], torch.Tensor]:
        """Return a fetch from dense fp16 copies on disk, a file a level."""
        for place in range(genomes.shape[1]):
            for level in np.unique(genomes[:, place]):
                save_file({"w": made(place, int(level)).half().cpu().contiguous()}, folder / f"{place}.{level}")
        return lambda place, level: load_file(folder / f"{place}.{level}")["w"]

    def grow(self) -> list[dict[str, object]]:
        """Return tokens/s by offspring, units and tokens a candidate."""
        rows: list[dict[str, object]] = []
        ours = self.evaluator()
        for offspring in (8, 16, 32, 64, 128, 256):
            genomes, _ = population(self.store, offspring)
            rows.append(self._rate("offspring", offspring, ours, genomes, self.options.seq_len))
        genomes, _ = population(self.store, 64)
        for tokens in (512, 2048, 8192, 32768):
            rows.append(self._rate("tokens", tokens, ours, genomes[: min(64, 2**17 // tokens + 4)], tokens))
        del ours
        for blocks in (9, 30, 60, 86):
            deep = self.deep(blocks)
            genomes, _ = population(deep.store, 64)
            rows.append(self._rate("units", len(deep.store.units), deep, genomes, self.options.seq_len))
        return rows

    def _rate(self, what: str, value: int, ours: Evaluator, genomes: np.ndarray, tokens: int) -> dict[str, object]:
        length = min(tokens, self.options.seq_len)
        windows = list(range(tokens // length))

        def work() -> object:
            return ours.token_losses(genomes, split="search", windows=windows, fitness=[KL()], length=length)

        taken = best_of(self.options.repeat, {"it": work}, [])["it"]
        return {
            "by": what,
            "value": value,
            "candidates": len(genomes),
            "tokens": tokens,
            "tokens_per_second": round(len(genomes) * tokens / taken),
        }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offspring", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--alone", type=int, default=8, help="candidates that are scored one by one")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", choices=["smollm2", "7b"], default="smollm2")
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--host", action="store_true", help="one by one: weights from host memory")
    parser.add_argument("--grow", action="store_true")
    options = parser.parse_args()
    bench = Bench(options)
    facts = bench.grow() if options.grow else bench.compare()
    print(json.dumps({"options": vars(options), "result": facts}, indent=1))


if __name__ == "__main__":
    main()
