"""Recipes for other quantizers: each is read back by the library that its format is of, or by the tool itself."""

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from evosweep.compressors.floating import FloatingPoint
from evosweep.compressors.ggml_types import GgmlTypes
from evosweep.compressors.gptq import GPTQ
from evosweep.core.allocation_text import load_genome
from evosweep.core.budget import Budget
from evosweep.core.errors import ExportError, SettingError
from evosweep.evaluate.population import Evaluator
from evosweep.exporters.recipe import ROUNDS_AGAIN, Recipe
from evosweep.exporters.recipes.listing import Listing, Setting, fitted
from evosweep.exporters.recipes.tools import TOOLS
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from evosweep.testing.problems import make_problem
from tests.models.test_anatomy import FAMILIES, small

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


def listing(**layers: Setting) -> Listing:
    """The allocation that the tools' own documents are compared with: q_proj of block 0, down_proj of block 1."""
    settings = {Q_PROJ: layers.get("q", wide(3)), DOWN_PROJ: layers.get("down", wide(8))}
    return Listing("org/model", "llama", 2, settings, np.zeros(2, dtype=np.int64), make_problem())


def wide(bits: int, columns: int = 512) -> Setting:
    return Setting(f"{bits}bit", columns, bits, 64)


def only(tool: str, made: Listing) -> str:
    (text,) = TOOLS[tool].files(made).values()
    return text


class TestForms:
    """The text is what the tool's own documents show."""

    def test_llama_cpp(self) -> None:
        text = only("llama_cpp", listing())
        assert text == "blk\\.0\\.attn_q\\.weight=q3_K\nblk\\.1\\.ffn_down\\.weight=q8_0\n"
        for line, name in zip(text.splitlines(), ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"], strict=True):
            pattern, _ = line.split("=")
            assert re.search(pattern, name) and not re.search(pattern, name.replace(".", ".1", 1))

    def test_llama_cpp_with_columns_that_k_types_do_not_take(self) -> None:
        made = listing(q=wide(3, columns=576), down=wide(6, columns=1536))
        assert only("llama_cpp", made).splitlines()[0].endswith("=q4_0")
        assert only("llama_cpp", made).splitlines()[1].endswith("=q6_K")
        assert TOOLS["llama_cpp"].notes(made)[0] == (
            "3 bits, groups of 64, asymmetric -> Q4_0 (4.5 bits a weight): 1 layers"
        )

    def test_gptqmodel(self) -> None:
        made = json.loads(only("gptqmodel", listing()))
        assert made["bits"] == 3 and made["group_size"] == 64 and made["sym"] is False
        assert made["dynamic"] == {r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8}, "-:^lm_head$": {}}

    def test_auto_round(self) -> None:
        made = json.loads(only("auto_round", listing(down=Setting("8bit", 512, 8, 64, symmetric=True))))
        assert made[Q_PROJ] == {"bits": 3, "group_size": 64, "sym": False}
        assert made[DOWN_PROJ] == {"bits": 8, "group_size": 64, "sym": True}

    def test_llm_compressor(self) -> None:
        modifier = yaml.safe_load(only("llm_compressor", listing()))["quant_stage"]["quant_modifiers"]["GPTQModifier"]
        assert modifier["ignore"] == ["lm_head"]
        group = modifier["config_groups"]["group_0"]
        assert group["targets"] == [Q_PROJ]
        assert group["weights"] == {
            "num_bits": 3,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 64,
            "dynamic": False,
        }

    def test_llm_compressor_s_schemes_are_those_of_compressed_tensors(self) -> None:
        from compressed_tensors.quantization import QuantizationScheme

        made = listing(q=Setting("nvfp4", 512, number="nvfp4"), down=wide(8))
        modifier = yaml.safe_load(only("llm_compressor", made))["quant_stage"]["quant_modifiers"]["GPTQModifier"]
        schemes = [QuantizationScheme.model_validate(group) for group in modifier["config_groups"].values()]
        assert [(scheme.weights.num_bits, scheme.weights.type) for scheme in schemes] == [(4, "float"), (8, "int")]

    def test_modelopt(self) -> None:
        made = listing(q=Setting("4bit", 512, 4, 128), down=wide(8))
        config = ast.literal_eval(only("modelopt", made).removeprefix("CONFIG = "))
        assert config["quant_cfg"] == [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": f"{Q_PROJ}.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
            {"quantizer_name": f"{DOWN_PROJ}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        ]

    def test_mlx_lm(self) -> None:
        assert json.loads(only("mlx_lm", listing()))[Q_PROJ] == {"group_size": 64, "bits": 3}
        ast.parse(TOOLS["mlx_lm"].command(listing()))

    def test_torchao(self) -> None:
        text = only("torchao", listing())
        ast.parse(text)
        assert f"{Q_PROJ!r}: IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(64)" in text
        assert '"_default": None' in text


class TestRecipe:
    @pytest.fixture
    def made(self, evaluator, store, loaded, make_store_problem, tmp_path):
        def make(**settings) -> Path:
            problem = make_store_problem(store)
            genome = np.arange(len(problem.units)) % 3
            folder = tmp_path / "recipes"
            facts = Recipe(**settings).export(
                genome, problem=problem, evaluator=evaluator, loaded=loaded, folder=folder
            )
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            assert facts["path"] == str(folder) and facts["bytes"] == written
            return folder

        return make

    def test_every_tool_gets_the_allocation_or_a_reason(self, made, store) -> None:
        folder = made()
        page = (folder / "README.md").read_text()
        assert ROUNDS_AGAIN in page
        assert all(f"## {tool.NAME}" in page or f"- {tool.NAME}: " in page for tool in TOOLS.values())
        assert "- ModelOpt: 2bit of model.layers.0.self_attn.q_proj: it exports INT4, INT8, FP8 and NVFP4 only" in page
        assert "- mlx-lm: 2bit of model.layers.0.self_attn.q_proj: its groups are 32, 64 or 128 columns" in page
        widths = yaml.safe_load((folder / "exllamav3.yaml").read_text())
        assert widths["tensors"] == {
            "*": 2,
            **{unit.name: place % 3 + 2 for place, unit in enumerate(store.units)},
        }
        numel = {unit.name: unit.numel for unit in store.units}
        bits = sum(numel[name] * widths["tensors"][name] for name in numel) / sum(numel.values())
        assert widths["target_bpw"] == pytest.approx(bits, abs=1e-4) and widths["head_bits"] == 6

    def test_a_list_for_evopress_is_read_back(self, made, store, make_store_problem) -> None:
        folder = made(format="evopress")
        assert (folder / "evopress.txt").read_text().splitlines()[1] == "model.layers.0.self_attn.k_proj: 3"
        genome = load_genome(folder / "evopress.txt", make_store_problem(store))
        assert genome.tolist() == [place % 3 for place in range(len(store.units))]

    def test_one_tool_alone(self, made) -> None:
        folder = made(format="gptqmodel")
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "allocation.json", "gptqmodel.json"]

    def test_a_width_that_a_tool_does_not_have_is_an_error_or_said(self, made) -> None:
        with pytest.raises(ExportError, match=r"ModelOpt: 2bit of .*q_proj: it exports INT4, INT8, FP8 and NVFP4"):
            made(format="modelopt")
        page = (made(format="modelopt", nearest=True) / "README.md").read_text()
        assert re.search(r"q_proj and \d+ more: 2 bits, groups of 16, asymmetric -> 4 bits, groups of 16", page)

    def test_commands_can_be_typed(self, made) -> None:
        page = (made() / "README.md").read_text()
        blocks = re.findall(r"```\n(.+?)\n```", page, flags=re.DOTALL)
        assert len(blocks) >= 6
        for block in blocks:
            if "import" in block:
                ast.parse(block)
            else:
                assert all(shlex.split(line, comments=True) for line in block.splitlines())


def test_levels_that_are_ggml_types_keep_them(anatomy, splits, loaded, tmp_path) -> None:
    store = StoreBuilder().open(
        plan_store(anatomy, GgmlTypes(types=["Q4_0", "Q8_0"])), splits["calibration"], model_name="tiny"
    )
    problem = Budget(bits_per_weight=9).problem(store.units)
    genome = np.arange(len(problem.units)) % 2
    Recipe().export(
        genome,
        problem=problem,
        evaluator=Evaluator(anatomy=anatomy, store=store, splits=splits),
        loaded=loaded,
        folder=tmp_path / "recipes",
    )
    lines = (tmp_path / "recipes" / "tensor-types.txt").read_text().splitlines()
    assert lines[:2] == [r"blk\.0\.attn_q\.weight=q4_0", r"blk\.0\.attn_k\.weight=q8_0"]
    toolkit = load_genome(tmp_path / "recipes" / "gptq_gguf_toolkit.txt", problem)
    assert toolkit.tolist() == genome.tolist()
    assert "- GPTQModel: Q4_0 of" in (tmp_path / "recipes" / "README.md").read_text()


def test_the_nearest_width_is_wider_where_two_are_as_near() -> None:
    refusal = TOOLS["gptqmodel"].refusal
    found = [fitted(wide(bits), lambda setting: refusal(setting, "llama")).bits for bits in (5, 6, 7)]
    assert found == [4, 8, 8]
    symmetric = fitted(wide(8), lambda setting: TOOLS["auto_round"].refusal(setting, "llama"))
    assert symmetric == Setting("8bit", 512, 8, 64, symmetric=True)
    assert fitted(Setting("nvfp4", 64, number="nvfp4"), lambda setting: refusal(setting, "llama")) is None


@pytest.mark.parametrize(
    ("settings", "compressor", "drop", "message"),
    [
        (
            {"format": "modelopt"},
            GPTQ(bits=[3, 4], group=16),
            Drop(),
            r"format must be a tool that makes 3bit of model\.layers\.0\.self_attn\.q_proj, or export\.nearest=true, "
            r"got 'modelopt'; ModelOpt: it exports INT4, INT8, FP8 and NVFP4 only; of these levels it takes 4bit",
        ),
        ({"format": "mlx_lm"}, GPTQ(bits=[3, 4], group=16), Drop(), "its groups are 32, 64 or 128 columns"),
        ({"format": "gptqmodel"}, FloatingPoint(formats=["e2m1"], group=16), Drop(), "integers of 2, 3, 4 and 8 bits"),
        (
            {"format": "llama_cpp"},
            GPTQ(group=16),
            Drop(granularity="blocks"),
            r"format must be one of evopress, all, got 'llama_cpp'; no other tool leaves parts of a model out",
        ),
    ],
)
def test_what_a_tool_cannot_make_is_an_error_before_the_search(settings, compressor, drop, message) -> None:
    with pytest.raises(SettingError, match=message):
        Recipe(**settings).check(compressor, drop, Anatomy(small("llama", **FAMILIES["llama"])))


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match=r"format must be one of all, llama_cpp.*did you mean 'llama_cpp'"):
        Recipe(format="llamacpp")
    with pytest.raises(SettingError, match="nearest must be"):
        Recipe(nearest="yes")
