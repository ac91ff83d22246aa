"""Allocations as text: EvoPress's published winners, and our own."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from evosweep.core.allocation_text import format_drops, format_genome, load_genome, parse_genome
from evosweep.core.errors import EvosweepError
from evosweep.core.problem import Problem
from evosweep.core.unit import Level, Nominal, Unit
from evosweep.testing.problems import make_problem

DROP = (Level("dropped", 0, nominal=Nominal("kept", 0.0)), Level("kept", 160, nominal=Nominal("kept", 1.0)))


def drop_problem(*names: str) -> Problem:
    units = tuple(Unit(f"model.layers.{name}", 10, int(name.split(".")[0].split("+")[0]), DROP) for name in names)
    return Problem(units, budget=160 * len(units))


SUBLAYERS = drop_problem(*(f"{block}.{name}" for block in range(4) for name in ("self_attn", "mlp")))


@pytest.mark.parametrize("style", ["level", "bits"])
def test_what_is_written_is_read_again(problem: Problem, style: str, tmp_path: Path) -> None:
    genome = np.arange(12) % 3
    text = format_genome(genome, problem, style=style)
    assert text.splitlines()[1] == "blocks.0.linear_1: " + {"level": "3bit", "bits": "3"}[style]
    (tmp_path / "winner.txt").write_text(text)
    assert load_genome(tmp_path / "winner.txt", problem).tolist() == genome.tolist()


def test_evopress_s_quantization_winner() -> None:
    text = "".join(f"blocks.{n // 3}.linear_{n % 3}: {2 + n % 3}\n" for n in reversed(range(12)))
    assert parse_genome(text, make_problem()).tolist() == [0, 1, 2] * 4


def test_allocation_json_is_read_as_before(problem: Problem, tmp_path: Path) -> None:
    genome = np.arange(12) % 3
    path = problem.decode(genome).save(tmp_path / "allocation.json")
    assert load_genome(path, problem).tolist() == genome.tolist()


def test_evopress_s_pruning_winner_is_in_steps_from_uniform() -> None:
    ladder = tuple(Level(f"{s}%", 100 - s, nominal=Nominal("sparsity", s / 100)) for s in (70, 60, 50, 40, 30))
    units = tuple(Unit(f"model.layers.{n}.fc", 100, n, ladder) for n in range(3))
    problem = Problem(units, budget=3 * 50)
    assert problem.uniform().tolist() == [2, 2, 2]
    text = "model.layers.0.fc: 2\nmodel.layers.1.fc: -1\nmodel.layers.2.fc: 0\n"
    assert parse_genome(text, problem).tolist() == [0, 3, 2]  # two steps sparser, one denser, uniform
    assert parse_genome(text.replace(": 2", ": +2"), problem).tolist() == [0, 3, 2]
    assert parse_genome(text.replace(": 2", ": 0.6").replace("-1", "30%"), problem).tolist() == [1, 4, 2]
    with pytest.raises(EvosweepError, match=r"w:1: level of model\.layers\.0\.fc must be one of 70%.*got '3'"):
        parse_genome(text.replace(": 2", ": 3"), problem, source="w")


def test_drop_configurations_of_sublayers() -> None:
    text = "none\nattn\nattn+mlp\nmlp\n"
    genome = parse_genome(text, SUBLAYERS)
    assert genome.tolist() == [1, 1, 0, 1, 0, 0, 1, 0]
    assert format_drops(genome, SUBLAYERS) == text


def test_evopress_s_published_drop_configuration() -> None:
    """Its Llama-2-7B at 25 %: drop_configs/Llama-2-7b-hf/0.25/layer_drop_config.txt."""
    lines = ["none"] * 9 + ["mlp", "attn+mlp", "mlp", "attn+mlp", "attn+mlp", "attn"] + ["none"] * 7
    lines += ["mlp", "attn+mlp", "attn", "attn+mlp", "none", "attn"] + ["none"] * 4
    names = (f"{block}.{name}" for block in range(32) for name in ("self_attn", "mlp"))
    genome = parse_genome("".join(f"{line}\n" for line in lines), drop_problem(*names))
    assert (genome[::2] == 0).sum() == (genome[1::2] == 0).sum() == 8  # a quarter of each
    assert genome[[18, 19, 20, 21, 29, 30]].tolist() == [1, 0, 0, 0, 1, 1]


def test_drop_configurations_of_blocks_and_pairs() -> None:
    blocks = drop_problem("0", "1", "2")
    assert parse_genome("none\nattn+mlp\nnone\n", blocks).tolist() == [1, 0, 1]
    assert format_drops(np.array([1, 0, 1]), blocks) == "none\nattn+mlp\nnone\n"
    pairs = drop_problem("0+1", "2+3")
    assert parse_genome("none\nnone\nattn+mlp\nattn+mlp\n", pairs).tolist() == [1, 0]
    assert format_drops(np.array([1, 0]), pairs) == "none\nnone\nattn+mlp\nattn+mlp\n"


def test_layers_inside_of_what_is_kept_stay_at_their_highest_level() -> None:
    layers = tuple(Level(f"{bits}bit", 100 * bits, nominal=Nominal("bits", bits)) for bits in (2, 3))
    units = []
    for block in range(2):
        inside = Unit(f"m.{block}.mlp.up_proj", 100, block, layers)
        units += [Unit(f"m.{block}.mlp", 1, block, DROP, gates=(inside.name,)), inside]
    problem = Problem(tuple(units), budget=920)
    assert parse_genome("mlp\nnone\n", problem).tolist() == [0, 1, 1, 1]


LINES = format_genome(np.zeros(12, dtype=np.int64), make_problem()).splitlines()
BAD = {
    "empty": ("", SUBLAYERS, "w is empty"),
    "no colon": ("\n".join([*LINES[:3], "hello"]), make_problem(), "w:4: 'hello' is not 'unit: level'"),
    "unknown unit": ("\nblocks.0.linear_9: 3", make_problem(), r"w:2: no unit is called .*did you mean 'blocks\.0\."),
    "unknown level": (
        "blocks.0.linear_0: 7",
        make_problem(),
        "w:1: level of .* must be one of 2bit, 3bit, 4bit, got '7'",
    ),
    "word as level": ("blocks.0.linear_0: many", make_problem(), "w:1: level of .*got 'many'"),
    "twice": ("\n".join([*LINES, LINES[0]]), make_problem(), "w:13: blocks.0.linear_0 has a level already"),
    "missing": ("\n".join(LINES[1:]), make_problem(), r"w: 1 units have no line \(blocks.0.linear_0"),
    "too few blocks": ("none\nattn", SUBLAYERS, "w has 2 lines, a line a block; the problem has block 2"),
    "half a block": ("attn\nnone\nnone", drop_problem("0", "1", "2"), "w:1: attn of block 0 cannot be dropped"),
    "too many blocks": ("none\nnone\nmlp", drop_problem("0", "1"), "w:3: mlp of block 2 cannot be dropped"),
    "half a pair": ("attn+mlp\nnone", drop_problem("0+1"), "w:1: (attn|mlp) of block 0 cannot be dropped"),
    "drops where none can": ("attn\nnone", make_problem(), "w:1: attn of block 0 cannot be dropped"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_names_file_and_line(case: str) -> None:
    text, problem, expected = BAD[case]
    with pytest.raises(EvosweepError, match=expected):
        parse_genome(text, problem, source="w")


def test_files_that_cannot_be_read(tmp_path: Path, problem: Problem) -> None:
    with pytest.raises(EvosweepError, match=r"none\.txt cannot be read"):
        load_genome(tmp_path / "none.txt", problem)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvosweepError, match=r"bytes\.txt is not UTF-8"):
        load_genome(tmp_path / "bytes.txt", problem)
    with pytest.raises(EvosweepError, match="cannot be read"):
        load_genome(tmp_path, problem)


def test_levels_without_a_number_are_written_by_name() -> None:
    units = (Unit("a", 10, 0, (Level("low", 1), Level("high", 2))),)
    problem = Problem(units, budget=2)
    assert format_genome(np.array([1]), problem) == "a: high\n"
    with pytest.raises(EvosweepError, match="level 'high' of a has no number of its own"):
        format_genome(np.array([1]), problem, style="bits")


def layer_problem(*levels: Level, blocks: int = 2) -> Problem:
    names = [
        f"model.layers.{block}.{layer}" for block in range(blocks) for layer in ("self_attn.q_proj", "mlp.up_proj")
    ]
    return Problem(tuple(Unit(name, 64, int(name.split(".")[2]), levels) for name in names), budget=10**6)


WIDTHS = tuple(Level(f"{bits}bit", 64 * bits, nominal=Nominal("bits", bits)) for bits in (2, 3, 4, 8))
TYPES = tuple(
    Level(name, cost, nominal=Nominal("bits_per_weight", cost / 64))
    for name, cost in (("q2_k", 168), ("q3_k", 220), ("q4_k", 288))
)


def test_gptq_gguf_toolkit_s_winner() -> None:
    """As its evo_quant_search.py writes it."""
    text = (
        "# found at 3.0 bits\n"
        "model.layers.0.self_attn.q_proj: 2.5625 (2.5625-Q2_K.pth)\n"
        "model.layers.0.mlp.up_proj: 3.4375 (3.4375-Q3_K.pth)\n"
        "model.layers.1.self_attn.q_proj: 4.5 (4.5-Q4_K.pth)\n"
        "model.layers.1.mlp.up_proj: 6.5625 (6.5625-Q6_K.pth)\n"
    )
    assert parse_genome(text, layer_problem(*WIDTHS)).tolist() == [0, 1, 2, 3]
    assert parse_genome(text, layer_problem(*TYPES)).tolist() == [0, 1, 2, 2]


def test_gptq_gguf_toolkit_s_list_of_gguf_names() -> None:
    """As its config_converter.py writes it, with the norms, which are no units."""
    text = "".join(
        f"blk.{block}.{name}.weight: {value}\n"
        for block, types in enumerate((("Q2_K", "Q3_K"), ("IQ4_XS", "F16")))
        for name, value in zip(("attn_q", "ffn_up", "attn_norm"), (*types, "32 (32-F32.pth)"), strict=True)
    )
    assert parse_genome(text, layer_problem(*WIDTHS)).tolist() == [0, 1, 2, 3]


def write_gguf(path: Path, *, family: str = "llama", blocks: int = 2) -> Path:
    writer = gguf.GGUFWriter(path, family)
    rng = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType
    for block in range(blocks):
        for name, kind in (("attn_q", types.Q4_0), ("ffn_up", types.Q8_0), ("attn_norm", types.F32)):
            values = rng.standard_normal((4, 32)).astype(np.float32)
            writer.add_tensor(f"blk.{block}.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_s_own_types_are_an_allocation(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert load_genome(path, layer_problem(*WIDTHS)).tolist() == [2, 3, 2, 3]
    assert load_genome(path, layer_problem(*WIDTHS[:2])).tolist() == [1, 1, 1, 1]
    with pytest.raises(EvosweepError, match=r"has no tensor for 2 of 6 layers \(model\.layers\.2\.self_attn\.q_proj"):
        load_genome(path, layer_problem(*WIDTHS, blocks=3))
    sparse = (Level("50%", 1, nominal=Nominal("sparsity", 0.5)), Level("0%", 2, nominal=Nominal("sparsity", 0.0)))
    with pytest.raises(
        EvosweepError, match=r"level of model\.layers\.0\.self_attn\.q_proj must be one of 50%, 0%, got"
    ):
        load_genome(path, layer_problem(*sparse))


def test_gguf_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, this is no GGUF file")
    with pytest.raises(EvosweepError, match=r"text\.gguf is not a GGUF file that can be read"):
        load_genome(tmp_path / "text.gguf", layer_problem(*WIDTHS))
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(EvosweepError, match=r"half\.gguf is not a GGUF file that can be read"):
        load_genome(tmp_path / "half.gguf", layer_problem(*WIDTHS))
    with pytest.raises(EvosweepError, match=r"none\.gguf cannot be read"):
        load_genome(tmp_path / "none.gguf", layer_problem(*WIDTHS))
    write_gguf(tmp_path / "other.gguf", family="abacus")
    with pytest.raises(EvosweepError, match="gguf knows no tensor names of 'abacus'"):
        load_genome(tmp_path / "other.gguf", layer_problem(*WIDTHS))


def test_steps_are_counted_from_the_uniform_level() -> None:
    ladder = tuple(Level(f"{s}%", 100 - s, nominal=Nominal("sparsity", s / 100)) for s in (70, 60, 50, 40, 30))
    problem = Problem(tuple(Unit(f"model.layers.{n}.fc", 100, n, ladder) for n in range(3)), budget=3 * 50)
    text = format_genome(np.array([0, 3, 2]), problem, style="steps")
    assert text == "model.layers.0.fc: 2\nmodel.layers.1.fc: -1\nmodel.layers.2.fc: 0\n"
    assert parse_genome(text, problem).tolist() == [0, 3, 2]
