"""Checkpoints that are quantized already, taken on request: their weights are what their codes mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evosweep.api import build_store
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import ModelError
from evosweep.core.problem import Problem
from evosweep.exporters.pack_quantized import CompressedTensors
from evosweep.models.anatomy import Anatomy
from evosweep.models.load import byte_tokenizer
from tests.models.test_checkpoint import WEIGHTS, change_config, load

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Values of a 4-bit float by its lower three bits; the fourth is the sign (OCP Microscaling Formats 1.0, 5.3.3)."""


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(loaded, splits, symmetric: bool, tmp_path: Path) -> None:
    bench = build_store(loaded, splits, RoundToNearest(bits=[4, 8], group=16, symmetric=symmetric))
    units = bench.store.units
    problem = Problem(units=units, budget=sum(unit.levels[1].cost for unit in units), fixed_bits=bench.store.fixed_bits)
    genome = np.zeros(len(units), dtype=np.int64)
    folder = tmp_path / "model"
    CompressedTensors().export(genome, problem=problem, evaluator=bench.evaluator, loaded=loaded, folder=folder)
    if not symmetric:
        with pytest.raises(ModelError, match=r"compressed-tensors with zero points\), which transformers dequantizes"):
            load(folder, dequantize=True)
        return
    with pytest.raises(ModelError, match=r"is already quantized \(compressed-tensors\).*or dequantize it"):
        load(folder)
    model = load(folder, dequantize=True)
    for index, unit in enumerate(units):
        torch.testing.assert_close(model.get_submodule(unit.name).weight.data, bench.evaluator.weight(index, 0))
    assert torch.equal(model.lm_head.weight, loaded.model.lm_head.weight)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_mxfp4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(vocab_size=256, hidden_size=64, intermediate_size=32, **sizes, **experts)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    expected = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, columns, rows = tensors.pop(name).shape
        codes = torch.randint(256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 128, (count, rows, columns // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = scales
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])[pairs] * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    with pytest.raises(ModelError, match=r"is already quantized \(mxfp4\)"):
        load(tmp_path)
    model = load(tmp_path, dequantize=True)
    assert len(expected) == 4
    for name, values in expected.items():
        assert torch.equal(model.get_parameter(name), values)
    assert "quantization_config" not in json.loads(model.config.to_json_string())
    Anatomy(model)


def test_fp8_weights_whose_last_block_is_narrower_are_refused(loaded, tmp_path: Path) -> None:
    """With blocks of 48, rows of 64 have two scales, which transformers spreads over 32 rows each."""
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    layer = "model.layers.1.mlp.up_proj"  # shape (64, 32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale_inv"] = torch.tensor([[1.0], [2.0]])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    others = [name for name, module in loaded.model.named_modules() if type(module) is torch.nn.Linear]
    others.remove(layer)
    sections = {"quant_method": "fp8", "modules_to_not_convert": others}
    for block, wrong in (([48, 32], True), ([32, 32], False)):
        config["quantization_config"] = {**sections, "weight_block_size": block}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if wrong:
            with pytest.raises(ModelError, match=rf"{layer}\.weight in .* \(64, 32\), which blocks of 48x32 do not"):
                load(tmp_path, dequantize=True)
        else:
            found = load(tmp_path, dequantize=True).get_submodule(layer).weight
            spread = torch.tensor([1.0, 2.0]).repeat_interleave(32)[:, None]
            assert torch.equal(found, tensors[f"{layer}.weight"].float() * spread)
