"""A small Mixtral through whole commands."""

from pathlib import Path

import pytest
import torch
import transformers

from evosweep.core.results import read_result
from evosweep.models.load import byte_tokenizer
from tests.cli import TINY, evosweep, workplace
from tests.mixtures.models import mixture

TEXT = [part for part in TINY if not part.startswith("model=")]
SMALL = [
    "model=hf",
    "model.path=mixtral",
    "compressor=gptq",
    "compressor.bits=[2,3,4]",
    "model.dtype=float32",
    "compressor.group=16",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    with workplace(tmp_path_factory.mktemp("mixtral")) as folder:
        mixture("mixtral", vocab_size=384, max_position_embeddings=256).save_pretrained(folder / "mixtral")
        byte_tokenizer().save_pretrained(folder / "mixtral")
        yield folder


def test_a_search_over_experts_is_exported_as_the_model_that_it_was(place: Path) -> None:
    assert evosweep(*TEXT, *SMALL, "budget.as_uniform=3", "sampler=evopress", "export=dense") == 0
    (folder,) = [path.parent for path in place.glob("runs/**/result.json")]
    row = read_result(folder / "result.json")
    assert row["export"]["max_logit_difference"] < 1e-4
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    dense = transformers.AutoModelForCausalLM.from_pretrained(place / "mixtral")
    assert type(model).__name__ == "MixtralForCausalLM"
    experts, before = (one.model.layers[1].mlp.experts.down_proj for one in (model, dense))
    assert all(len(torch.unique(expert)) < len(torch.unique(old)) for expert, old in zip(experts, before, strict=True))
