"""The main job on the real model and the real text, small enough for every test run."""

import pytest
import torch
import transformers

from evosweep.core.results import read_result
from tests.cli import evosweep

pytestmark = pytest.mark.slow


@pytest.fixture
def real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are kept where users keep them."""
    import platformdirs

    monkeypatch.setenv("EVOSWEEP_CACHE", platformdirs.user_cache_dir("evosweep", appauthor=False))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_the_main_job_on_smollm2(real_cache, in_tmp) -> None:
    threads = torch.get_num_threads()
    code = evosweep(
        "+experiment=quickstart",
        "sampler=uniform,evopress",
        "budget=as_uniform",
        "budget.megabytes=null",
        "report.prompts=[]",
        "search.final=64",
        "export=dense",
        "export.jobs=all",
        "compressor=rtn",
        "compressor.bits=[2,3,4]",
        "tokens.seq_len=64",
        "tokens.calibration=256",
        "tokens.validation=512",
        "search.generations=1",
        "search.offspring=3",
        "search.stages=[{survivors:1,tokens:64}]",
    )
    assert code == 0 and torch.get_num_threads() == threads
    rows = {}
    for path in in_tmp.glob("runs/quickstart/*/*/result.json"):
        row = read_result(path)
        rows[row["sampler"]] = row
    assert set(rows) == {"uniform", "evopress"}
    for row in rows.values():
        assert row["bits_per_weight"] == pytest.approx(3 + 19 / 64)
        assert 15 < row["dense_ppl"] < 60 < row["ppl"] < 2000
        assert row["kl"] > 0
    folder = rows["uniform"]["export"]["path"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        best = model(input_ids=tokens).logits[0, -1].topk(20).indices
    assert any("Paris" in tokenizer.decode([token]) for token in best)
