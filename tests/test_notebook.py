"""The notebook runs from top to bottom on the tiny model, and shows what it says it shows."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.cli import write_corpus

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
TINY = """
from functools import partial

import transformers

from evosweep.models.load import Random

config = partial(
    transformers.LlamaConfig, vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)
source = Random(name="tiny", config=config, spread=0.15)
documents = "corpus.jsonl"
sizes = {"seq_len": 64, "calibration": 1024, "validation": 512}
stages = [{"survivors": 2, "tokens": 64}, {"survivors": 1, "tokens": 128}]
generations, group, folder = 2, 16, "model"
"""


def test_the_notebook_runs(in_tmp, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(in_tmp / "cache"))
    write_corpus(in_tmp)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = {line.split(" = ")[0] for line in settings.source.splitlines() if " = " in line}
    assert names <= {line.split(" = ")[0] for line in TINY.splitlines()}, "the tiny settings miss some"
    settings.source = TINY
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(in_tmp)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "14 units; model.layers.0.self_attn.q_proj has" in text and "bits a weight, KL" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert (in_tmp / "model").is_dir()


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
