"""Families of models, tried small: right in every step, or refused by name before any work."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.families.__main__ import PAGE, quiet
from tests.families.configs import CAUSAL, SEEING, families
from tests.families.table import markdown
from tests.families.trial import Row, try_family

BLOCKS = {"without blocks": "where it is loaded again"}
SHARED = {"sub-blocks": "shares parameters with", "blocks": "shares parameters with"}
KINDS: dict[str, dict[str, str]] = {
    # dense: rotary, learned and relative positions, parallel and sequential, transposed weights, biases, soft caps
    **{kind: {} for kind in ("llama", "gpt2", "opt", "gemma2", "phi", "bloom", "mpt", "gpt_neox")},
    "minicpm3": {},  # latent attention, and a scale that depends on the number of blocks
    "diffllama": BLOCKS,  # a constant that depends on the block's index
    # mixtures: fused experts, shared experts, dense first blocks
    **{kind: {} for kind in ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4_text")},
    **{kind: {} for kind in ("dbrx", "jetmoe")},  # experts in parameters of other shapes, in attention too
    # states instead of attention, alone and beside it
    **{kind: {} for kind in ("mamba", "lfm2", "nemotron_h")},
    "jamba": BLOCKS,  # a period says which blocks are which
    "rwkv": BLOCKS,  # the first block has a norm of its own
    # more than hidden states between blocks, and weights that blocks share
    "gemma3n_text": {"blocks": "leaves keys and values for later blocks"},
    "gemma4_text": BLOCKS,  # an embedding for every block
    "zaya": {"blocks": "returns more than hidden states"},
    "zamba2": SHARED,
    # images and text
    "llava": {},
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


def loader_of(kind: str) -> str:
    return SEEING if kind == "llava" else CAUSAL


@pytest.mark.parametrize("kind", KINDS)
def test_one_family_of_each_kind_is_right_in_every_step(kind: str, tmp_path: Path) -> None:
    row = try_family(kind, tmp_path, loader=loader_of(kind), thorough=False)
    assert not row.unbuilt
    assert not row.faults
    assert row.refused.keys() == KINDS[kind].keys(), row.refused
    for step, text in KINDS[kind].items():
        assert text in row.refused[step]
        assert "\n" not in row.refused[step]
    assert row.units >= 4
    wanted = {"chain", "scored", "dense", "packed", "dropped", "removed", "blocks", "without blocks"}
    missing = {"sub-blocks": {"dropped", "removed"}, "blocks": {"blocks", "without blocks"}}
    assert row.errors.keys() == wanted - {name for step in KINDS[kind] for name in missing.get(step, {step})}
    assert max(row.errors.values()) <= 1e-5


def test_a_fault_is_found() -> None:
    """A score that is off by a thousandth is a fault of the trial."""
    row = Row("llama")
    row.compare("scored", torch.tensor([1.0, 2.002]), torch.tensor([1.0, 2.0]))
    assert "differs by 0.001" in row.faults["scored"]
    with row.step("load"):
        raise ValueError("two\nlines")
    assert row.faults["load"].startswith("ValueError: two lines")


def test_the_page_has_every_family_of_this_version() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip(f"docs/models.md was written with another version than {transformers.__version__}")
    missing = [kind for kind in families() if f"| {kind} |" not in page]
    assert not missing
    assert "**wrong**" not in page


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    """Rows by family; the page is written where all were tried."""
    found: dict[str, Row] = {}
    yield found
    if found.keys() == families().keys():
        PAGE.write_text(markdown([found[kind] for kind in families()]), encoding="utf-8")


@pytest.mark.families
@pytest.mark.parametrize("kind", families())
def test_every_family_is_right_or_refused(kind: str, tmp_path: Path, rows: dict[str, Row]) -> None:
    rows[kind] = try_family(kind, tmp_path, loader=families()[kind])
    assert not rows[kind].faults
