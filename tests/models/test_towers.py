"""Models of images and text: the text decoder is compressed, everything else is exported as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from evosweep.api import build_store
from evosweep.compressors.gptq import GPTQ
from evosweep.core.errors import ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.core.problem import Problem
from evosweep.exporters.dense import DenseSafetensors
from evosweep.exporters.gguf_file import GgufFile
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.exporters.packed import PackedSafetensors
from evosweep.models.blocks import find_blocks
from evosweep.models.load import HuggingFace, LoadedModel
from evosweep.models.transforms.rotate import Rotate
from evosweep.testing.tiny import tiny_splits
from evosweep.workbench import Workbench
from tests.models.seeing import CONFIGS, save_seeing
from tests.models.test_checkpoint import Notes


def load(folder: Path, progress=None, **settings) -> LoadedModel:
    return HuggingFace(path=str(folder), dtype="float32", device="cpu", **settings).load(progress=progress or Silent())


def opened(loaded: LoadedModel) -> tuple[Workbench, Problem]:
    bench = build_store(loaded, tiny_splits(loaded), GPTQ(bits=[2, 4], group=32))
    units = bench.store.units
    budget = sum(unit.levels[-1].cost for unit in units)
    return bench, Problem(units=units, budget=budget, fixed_bits=bench.store.fixed_bits)


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_beside_the_text_decoder_is_exported_as_it_was(family: str, tmp_path: Path) -> None:
    notes = Notes()
    loaded = load(save_seeing(family, tmp_path / family), notes)
    bench, problem = opened(loaded)
    prefix = "model.language_model.layers."
    assert [unit.name for unit in problem.units] == [slot.name for slot in bench.anatomy.slots]
    assert len(problem.units) == 14 and all(unit.name.startswith(prefix) for unit in problem.units)
    assert bench.plan.coverage.share == 1.0
    assert any(f"the 2 blocks of {prefix[:-1]} are compressed; as they are: model.vis" in line for line in notes.lines)
    inside = sum(unit.numel for unit in problem.units)
    everything = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert bench.fixed_bits == 32 * (everything - inside)
    genome = np.random.default_rng(0).integers(0, 2, len(problem.units))
    compressed = {unit.name + ".weight" for unit in problem.units}
    for exporter in (DenseSafetensors(), PackedSafetensors()):
        folder = tmp_path / type(exporter).__name__
        facts = exporter.export(genome, problem=problem, evaluator=bench.evaluator, loaded=loaded, folder=folder)
        assert facts["max_logit_difference"] <= 1e-5
        reloaded = exporter.reload(folder, dtype=torch.float32)
        assert type(reloaded) is type(loaded.model)
        before = loaded.model.state_dict()
        after = reloaded.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} == compressed


def test_an_exported_model_still_sees(tmp_path: Path) -> None:
    loaded = load(save_seeing("llava", tmp_path / "llava"))
    bench, problem = opened(loaded)
    folder = tmp_path / "out"
    genome = np.ones(len(problem.units), dtype=np.int64)
    facts = DenseSafetensors().export(genome, problem=problem, evaluator=bench.evaluator, loaded=loaded, folder=folder)
    assert facts["load"].endswith("model = AutoModelForImageTextToText.from_pretrained(folder)")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    inputs = processor(images=picture, text="<image> what is it?", return_tensors="pt")
    assert int((inputs["input_ids"] == 256).sum()) == 4
    reloaded = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        seen = reloaded(**inputs).logits
        for index, slot in enumerate(bench.anatomy.slots):
            slot.write(bench.evaluator.weight(index, 1))
        torch.testing.assert_close(seen, loaded.model(**inputs).logits)
        blind = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert not torch.allclose(seen, reloaded(**blind).logits)


def test_what_cannot_hold_towers_is_refused_before_the_search(tmp_path: Path) -> None:
    loaded = load(save_seeing("llava", tmp_path / "llava"))
    bench = build_store(loaded, tiny_splits(loaded), GPTQ(bits=[2, 4], group=32))
    budget = sum(unit.levels[-1].cost for unit in bench.planned)
    problem = Problem(units=bench.planned, budget=budget)
    for exporter in (GgufFile(), CompressedTensors()):
        with pytest.raises(
            SettingError, match="holds the parts beside its text decoder: export=dense or export=packed"
        ):
            exporter.check_problem(problem, bench.anatomy)
    with pytest.raises(ModelError, match=r"LlavaForConditionalGeneration adds .* images .*: transform.residual=false"):
        Rotate().apply(loaded, progress=Silent())


def test_kind_says_which_model_is_loaded(tmp_path: Path) -> None:
    folder = save_seeing("llava", tmp_path / "llava")
    with pytest.raises(
        ModelError, match=r"model.kind: .* is a llava, whose text model transformers does not load alone"
    ):
        load(folder, kind="text")
    text = tmp_path / "text"
    config = transformers.LlamaConfig(**CONFIGS["llava"]().text_config.to_dict())
    transformers.LlamaForCausalLM(config).save_pretrained(text)
    with pytest.raises(ModelError, match=r"model.kind: .* is a llama, .* no model of images and text: model.kind=text"):
        load(text, kind="vision_language")
    with pytest.raises(SettingError, match=r"^kind must be one of auto, text, vision_language"):
        load(text, kind="vision")


def test_a_text_decoder_that_cannot_be_found_is_one_line() -> None:
    model = transformers.AutoModelForImageTextToText.from_config(CONFIGS["llava"]())
    model.model.language_model.layers = nn.ModuleDict(
        {str(index): block for index, block in enumerate(model.model.language_model.layers)}
    )
    with pytest.raises(ModelError, match=r"no text decoder was found .* only model.vision_tower.encoder.layers"):
        find_blocks(model)
