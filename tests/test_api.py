"""From Python, without Hydra: the file that README shows, as it stands."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import evosweep
from evosweep.core.errors import SettingError
from evosweep.models.load import LoadedModel, Random
from evosweep.testing.tiny import tiny_config
from tests.cli import write_corpus

QUICK = Path(__file__).parent.parent / "examples" / "quick.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a text, as a user has them."""
    from evosweep.models.load import byte_tokenizer

    place = tmp_path_factory.mktemp("api")
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(hidden_size=64, intermediate_size=128))
    model.save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    write_corpus(place)
    return place


def test_the_example_runs_as_it_stands(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["quick.py", "model", "corpus.jsonl"])
    names: dict[str, object] = {}
    exec(compile(QUICK.read_text(), str(QUICK), "exec"), names)
    result, problem, packed = names["result"], names["problem"], names["packed"]
    assert isinstance(packed, transformers.PreTrainedModel) and (folder / "winner" / "packed.json").is_file()
    assert problem.feasible(problem.encode(result.allocation))
    assert capsys.readouterr().out.startswith(f"kl {result.validation['kl']:.4f} at ")
    statements = [node for node in ast.parse(QUICK.read_text()).body[1:] if not isinstance(node, ast.Import)]
    assert len(statements) <= 15


def test_an_error_names_the_argument_not_a_setting(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"^group must be"):
        evosweep.GPTQ(bits=[3], group=0)
    loaded: LoadedModel = evosweep.load(folder / "model", device="cpu")
    with pytest.raises(SettingError, match=r"^seq_len must be"):
        evosweep.tokenize(folder / "corpus.jsonl", loaded, seq_len=0)


def test_importing_costs_nothing_and_every_public_name_is_there() -> None:
    code = "import sys, evosweep; print([n for n in ('torch', 'optuna', 'mlflow', 'hydra') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(evosweep, name) for name in evosweep.__all__)
    with pytest.raises(AttributeError, match="nowhere"):
        evosweep.nowhere  # noqa: B018


def test_a_model_is_rotated_while_it_is_loaded(folder: Path) -> None:
    loaded = evosweep.load(folder / "model", dtype="float32", device="cpu")
    rotated = evosweep.load(folder / "model", dtype="float32", device="cpu", transform=evosweep.Rotate(seed=1))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected, logits = loaded.model(tokens).logits, rotated.model(tokens).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(rotated.model.lm_head.weight, loaded.model.lm_head.weight, atol=1e-3)


def test_windows_longer_than_learned_positions_are_one_line_before_any_work(splits) -> None:
    sizes = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    source = Random(name="short", config=lambda: transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    with pytest.raises(SettingError, match=r"^tokens\.seq_len must be at most 16, the positions .*, got 32$"):
        evosweep.build_store(evosweep.load(source), splits, evosweep.GPTQ(bits=[2], group=16))
