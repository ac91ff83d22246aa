import itertools
from dataclasses import replace

import numpy as np
import pytest

from evosweep.core.allocation_text import format_genome, parse_genome
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.problem import Problem
from evosweep.core.ties import Expansion, loose, matching, tied
from evosweep.core.unit import Level, Nominal, Unit

NUMELS = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "self_attn.o_proj": 64, "mlp.up_proj": 128}
FUSED = [(f"layers.{block}.self_attn.q_proj", f"layers.{block}.self_attn.k_proj") for block in range(2)]


def unit(block: int, kind: str, widths: tuple[int, ...] = (2, 3, 4)) -> Unit:
    numel = NUMELS[kind]
    levels = tuple(
        Level(
            f"{width}bit",
            width * numel,
            error=numel / 4**width,
            relative_error=4.0**-width,
            nominal=Nominal("bits", width),
        )
        for width in widths
    )
    return Unit(f"layers.{block}.{kind}", numel, block, levels, columns={"outliers": float(numel)})


def layers() -> tuple[Unit, ...]:
    return tuple(unit(block, kind) for block in range(2) for kind in NUMELS)


def test_a_tied_unit_is_the_stacked_matrix_of_its_layers() -> None:
    first = tied(layers(), FUSED)[0]
    assert first.name == "layers.0.self_attn.q_proj+k_proj" and first.kind == "self_attn.q_proj+k_proj"
    assert first.numel == 96 and [level.cost for level in first.levels] == [192, 288, 384]
    assert [level.error for level in first.levels] == pytest.approx([96 / 4**width for width in (2, 3, 4)])
    assert [level.relative_error for level in first.levels] == pytest.approx([4.0**-width for width in (2, 3, 4)])
    assert first.columns == {"outliers": pytest.approx((64 * 64 + 32 * 32) / 96)}
    assert [layer.name for layer in first.members] == list(FUSED[0])
    assert first.levels[1].nominal == Nominal("bits", 3)


def test_a_tied_problem_has_the_allocations_of_the_layers_that_keep_its_ties() -> None:
    plain = Problem(units=layers()[:4], budget=850)
    problem = replace(plain, units=tied(plain.units, FUSED))
    found = set()
    expand = Expansion.of(problem.units, plain.units)
    for levels in itertools.product(range(3), repeat=3):
        genome = np.array(levels)
        assert problem.cost(genome) == plain.cost(expand(genome))
        if problem.feasible(genome):
            found.add(tuple(expand(genome).tolist()))
    every = (np.array(levels) for levels in itertools.product(range(3), repeat=4))
    assert found == {tuple(g.tolist()) for g in every if plain.feasible(g) and g[0] == g[1]}
    assert 1 < len(found) < 27


def test_genomes_expand_in_a_batch_and_those_of_layers_stay() -> None:
    plain = layers()
    units = tied(plain, [(plain[0].name, plain[2].name)])
    expand = Expansion.of(units, plain)
    genomes = np.array([[2, 0, 1, 0, 1, 2, 0], [0, 1, 2, 2, 2, 2, 2]])
    expected = [[2, 0, 2, 1, 0, 1, 2, 0], [0, 1, 0, 2, 2, 2, 2, 2]]
    assert expand(genomes).tolist() == expected
    assert expand(expand(genomes)).tolist() == expected
    with pytest.raises(EvosweepError, match="7 units or 8 layers"):
        expand(np.zeros(5, dtype=np.int64))


def test_levels_that_cost_otherwise_keep_their_names_in_every_layer() -> None:
    first, second = unit(0, "self_attn.q_proj"), unit(0, "self_attn.k_proj")
    swapped = replace(
        second, levels=tuple(sorted((replace(v, cost=900 - v.cost) for v in second.levels), key=lambda v: v.cost))
    )
    one = tied([first, swapped], FUSED)[0]
    assert [level.cost for level in one.levels] == [64 * w + 900 - 32 * w for w in (2, 3, 4)]
    expand = Expansion.of([one], [first, swapped])
    assert expand(np.array([0])).tolist() == [0, 2]


def test_allocations_are_written_by_layer_and_read_either_way(tmp_path) -> None:
    problem = Problem(units=tied(layers(), FUSED), budget=10_000)
    genome = np.array([2, 0, 1, 0, 1, 2])
    path = problem.save(problem.decode(genome), tmp_path / "allocation.json", kl=0.5)
    import json

    written = json.loads(path.read_text())
    assert written["ties"] == [list(names) for names in FUSED] and written["kl"] == 0.5
    assert list(written["allocation"]) == [layer.name for layer in layers()]
    assert written["allocation"][FUSED[0][1]] == "4bit"
    assert problem.encode(written["allocation"]).tolist() == genome.tolist()
    assert problem.encode(problem.decode(genome)).tolist() == genome.tolist()
    text = "".join(f"{name}: {level[0]}\n" for name, level in written["allocation"].items())
    assert parse_genome(text, problem).tolist() == genome.tolist()
    assert format_genome(genome, problem, style="bits") == text


def test_an_allocation_that_breaks_a_tie_is_refused() -> None:
    problem = Problem(units=tied(layers(), FUSED), budget=10_000)
    levels = {layer.name: "3bit" for layer in layers()} | {FUSED[1][0]: "2bit"}
    with pytest.raises(
        EvosweepError, match=r"layers\.1\.self_attn\.q_proj 2bit, layers\.1\.self_attn\.k_proj 3bit; see units\.tie"
    ):
        problem.encode(levels)
    text = "".join(f"{name}: {level}\n" for name, level in levels.items())
    with pytest.raises(EvosweepError, match=r"allocation:6: .*k_proj is tied in layers\.1\.self_attn\.q_proj\+k_proj"):
        parse_genome(text, problem)


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("self_attn.*", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")),
        ("*.[qk]_proj", ("self_attn.q_proj", "self_attn.k_proj")),
        (r"self_attn\.(q|o)_proj", ("self_attn.q_proj", "self_attn.o_proj")),
        ("layers.0.*", tuple(NUMELS)),
    ],
)
def test_patterns_are_globs_or_regular_expressions(pattern: str, first: tuple[str, ...]) -> None:
    assert matching(layers(), [pattern])[0] == tuple(f"layers.0.{kind}" for kind in first)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("self_attn.qproj", r"tie must be .* got 'self_attn\.qproj'; layers are .*did you mean 'self_attn\.q_proj'"),
        ("*.up_proj", r"matches layers\.0\.mlp\.up_proj alone"),
        ("(q", "a glob or a regular expression"),
    ],
)
def test_a_pattern_that_ties_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        matching(layers(), [pattern])


def test_ties_that_share_a_layer_are_one() -> None:
    names = [layer.name for layer in layers()]
    one = tied(layers(), [names[:2], names[1:3]])[0]
    assert [layer.name for layer in one.members] == names[:3]


def test_layers_with_other_levels_are_refused_by_name() -> None:
    units = [unit(0, "self_attn.q_proj"), unit(0, "self_attn.k_proj", (2, 4))]
    with pytest.raises(SettingError, match=r"got 'q_proj\+k_proj'; .*k_proj has no level 3bit, which .*q_proj has"):
        tied(units, FUSED)
    assert tied(units, FUSED, common=True)[0].level_names == ("2bit", "4bit")
    apart = [units[0], unit(0, "self_attn.k_proj", (8,))]
    with pytest.raises(SettingError, match="share no level"):
        tied(apart, FUSED, common=True)


def test_layers_that_are_dropped_apart_are_refused() -> None:
    gates = [
        Unit(name, 0, 0, (Level("dropped", 0), Level("kept", 0)), gates=(gated,))
        for name, gated in (("attn", "layers.0.self_attn.q_proj"), ("mlp", "layers.0.mlp.up_proj"))
    ]
    units = [*gates, unit(0, "self_attn.q_proj"), unit(0, "mlp.up_proj")]
    with pytest.raises(SettingError, match="dropped apart"):
        tied(units, [("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj")])


def test_a_gate_names_the_tied_unit() -> None:
    gate = Unit("layers.0", 0, 0, (Level("dropped", 0), Level("kept", 0)), gates=tuple(f"layers.0.{k}" for k in NUMELS))
    problem = Problem(units=tied([gate, *layers()[:4]], FUSED), budget=10_000)
    assert problem.units[0].gates[0] == "layers.0.self_attn.q_proj+k_proj"
    assert problem.cost(np.array([0, 2, 2, 2])) == 0 and problem.cost(np.array([1, 0, 0, 0])) == 2 * sum(
        NUMELS.values()
    )


def test_loose_ties_are_those_that_a_search_may_break() -> None:
    assert loose(layers(), FUSED) == FUSED
    assert loose(tied(layers(), FUSED), FUSED) == []
    assert loose(tied(layers(), [[layer.name for layer in layers()[:4]]]), FUSED) == FUSED[1:]
    problem = Problem(units=layers(), budget=10_000)
    assert loose(problem.only(np.ones(8, dtype=np.int64)).units, FUSED) == []
    assert loose(problem.only(np.array([0, 1, 0, 0, 1, 1, 0, 0])).units, FUSED) == FUSED[:1]
