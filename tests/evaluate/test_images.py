"""Scoring, calibration and export of a model of images and text on images: equal to the whole model's own forward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import ModelError
from evosweep.core.events import Progress, Silent
from evosweep.core.problem import Problem
from evosweep.data.images import ImageFiles
from evosweep.data.pictures import FIRST
from evosweep.data.tokens import TokenSplit, Windows
from evosweep.exporters.packed import PackedSafetensors
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.dropping import Drop
from evosweep.models.load import HuggingFace, LoadedModel
from evosweep.models.patch import replaced_weights
from evosweep.models.transforms.smooth import Smooth
from evosweep.workbench import Materials, Workbench, open_bench
from tests.data.test_images import draw
from tests.models.seeing import save_seeing, seeing_tokenizer

SHARPER = 8.0  # times the head's weights: what a model expects is far from uniform then, and levels change it
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "qwen3_vl")


class QwenProcessor:
    """What Qwen2.5-VL's processor, which needs torchvision to be made, does with an image and its text."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.image_processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 56)
        self.tokenizer = seeing_tokenizer()

    def __call__(self, images: list[Any], text: list[str], return_tensors: str) -> dict[str, torch.Tensor]:
        made = self.image_processor(images=images, return_tensors=return_tensors)
        count = int(made["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        written = text[0].replace(self.image_token, self.image_token * count)
        ids = self.tokenizer([written], return_tensors=return_tensors)["input_ids"]
        return {"input_ids": ids, "mm_token_type_ids": (ids == 256).int(), **made}

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class Source(HuggingFace):
    """A checkpoint with a sharper head, and of Qwen with a processor beside it."""

    def load(self, *, progress: Progress) -> LoadedModel:
        loaded = super().load(progress=progress)
        loaded.model.get_output_embeddings().weight.mul_(SHARPER)
        qwen = loaded.model.config.model_type.startswith("qwen")
        return replace(loaded, processor=QwenProcessor()) if qwen else loaded


def materials(folder: Path, images: Path, **more: Any) -> Materials:
    shares = {"validation": 0.25, "search": 0.25, "calibration": 0.5}
    return Materials(
        model=Source(path=str(folder), dtype="float32", device="cpu"),
        data=ImageFiles(path=str(images)),
        tokens=Windows(seq_len=32, calibration=192, validation=96, shares=shares),
        compressor=GPTQ(bits=[2, 4], group=32),
        drop=Drop(granularity="sublayers"),
        **more,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOSWEEP_CACHE", str(place / "cache"))
        made = open_bench(
            materials(save_seeing(request.param, place / "model"), draw(place / "images")), progress=Silent()
        )
        assert made.store.units
    return made


def given(split: TokenSplit) -> dict[str, torch.Tensor]:
    return split.pictures.arguments(torch.from_numpy(split.windows), dtype=torch.float32)


def swapped(bench: Workbench, genome: np.ndarray) -> torch.Tensor:
    """Return the whole model's logits on images, its weights overwritten by a genome's."""
    indices = {unit.name: index for index, unit in enumerate(bench.store.units)}
    slots = [slot for slot in bench.anatomy.slots if slot.name in indices]
    weights = {slot.name: bench.evaluator.weight(indices[slot.name], int(genome[indices[slot.name]])) for slot in slots}
    gone = [effect.writer for index, effect in bench.store.drops.items() if genome[index] == 0]
    hooks = [
        bench.loaded.model.get_submodule(writer).register_forward_hook(
            lambda _m, _a, out: (
                (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
            )
        )
        for writer in gone
    ]
    with torch.no_grad(), replaced_weights(slots, weights):
        logits = bench.loaded.model(**given(bench.splits["search"]), use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return logits


def test_what_is_scored_is_what_the_whole_model_computes(bench: Workbench) -> None:
    split = bench.splits["search"]
    tokens = torch.from_numpy(split.windows)
    # Qwen3-VL adds features of an image behind its first blocks, which no block sees.
    assert bool(bench.anatomy.whole_because) == (bench.loaded.model.config.model_type == "qwen3_vl")
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 2, (4, len(bench.store.units)))
    genomes[:2, list(bench.store.drops)] = 1
    windows = range(len(tokens))
    found = bench.evaluator.score(genomes, split="search", windows=windows, fitness=[KL(), Perplexity()])
    with torch.no_grad():
        dense = bench.loaded.model(**given(split), use_cache=False).logits.double()[:, :-1].log_softmax(-1)
    text = tokens[:, 1:] < FIRST
    for genome, kl, ppl in zip(genomes, found["kl"], found["ppl"], strict=True):
        changed = swapped(bench, genome)[:, :-1].log_softmax(-1)
        losses = (dense.exp() * (dense - changed)).sum(-1)
        by_window = [float(loss[kept].mean()) for loss, kept in zip(losses, text, strict=True)]
        assert kl == pytest.approx(np.mean(by_window), rel=1e-5, abs=1e-7)
        assert kl > 1e-3
        labels = split.pictures.plain(tokens)[:, 1:, None]
        nats = -changed.gather(2, labels)[..., 0]
        expected = np.mean([float(loss[kept].mean()) for loss, kept in zip(nats, text, strict=True)])
        assert np.log(ppl) == pytest.approx(expected, rel=1e-5)
    blind = bench.evaluator.score(None, split="search", windows=windows, fitness=[KL()])["kl"]
    assert float(abs(blind).max()) < 1e-6


def test_only_so_many_tokens_of_a_window_give_the_same_losses(bench: Workbench) -> None:
    genome = np.ones((1, len(bench.store.units)), dtype=np.int64)
    whole = bench.evaluator.token_losses(genome, split="search", windows=[0, 2], fitness=[KL()])["kl"]
    part = bench.evaluator.token_losses(genome, split="search", windows=[0, 2], fitness=[KL()], length=20)["kl"]
    assert part.shape == (1, 2, 19)
    text = bench.splits["search"].windows[[0, 2], 1:] < FIRST
    assert (part[0][~text[:, :19]] == 0).all() and (whole[0][~text] == 0).all()
    for few, all_of_them, kept in zip(part[0], whole[0], text, strict=True):  # each as a share of a mean over text
        np.testing.assert_allclose(few * kept[:19].sum() / 19, (all_of_them * kept.sum() / 31)[:19], rtol=1e-5)


def test_calibration_sees_the_images(bench: Workbench) -> None:
    """The second moment of the first layer's inputs is that of the merged embeddings: blind, the levels are others."""
    slot = bench.anatomy.slots[0]
    seen: list[torch.Tensor] = []
    handle = slot.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    split = bench.splits["calibration"]
    tokens = torch.from_numpy(split.windows)
    with torch.no_grad():
        bench.loaded.model(**given(split), use_cache=False)
        bench.anatomy.run(tokens)
        bench.loaded.model(input_ids=split.pictures.plain(tokens), use_cache=False)
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0])
    image = tokens >= FIRST
    assert not torch.allclose(seen[2][image], seen[0][image])


def test_an_export_is_proved_on_images(bench: Workbench, tmp_path: Path) -> None:
    units = bench.store.units
    problem = Problem(
        units=units, budget=sum(unit.levels[-1].cost for unit in units), fixed_bits=bench.store.fixed_bits
    )
    genome = np.ones(len(units), dtype=np.int64)
    exporter = PackedSafetensors()
    folder = tmp_path / "packed"
    facts = exporter.export(genome, problem=problem, evaluator=bench.evaluator, loaded=bench.loaded, folder=folder)
    assert facts["max_logit_difference"] < 1e-4
    reloaded = exporter.reload(folder, dtype=torch.float32)
    with torch.no_grad():
        found = reloaded(**given(bench.splits["search"]), use_cache=False).logits.double()
    torch.testing.assert_close(found, swapped(bench, genome), rtol=1e-5, atol=1e-5)


def test_a_model_or_transform_that_images_do_not_fit_is_one_line(tmp_path: Path) -> None:
    images = draw(tmp_path / "images")
    folder = save_seeing("llava", tmp_path / "llava")
    with pytest.raises(ModelError, match=r"transform: data=images needs one that measures nothing: transform=none"):
        open_bench(materials(folder, images, transform=Smooth()), progress=Silent())
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelError, match=r"data=images needs the model's processor, and the checkpoint llava has none"):
        open_bench(materials(folder, images), progress=Silent())
