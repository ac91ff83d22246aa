"""Gemma 3 270M out of its four wheels: what its GGUF gives through transformers, and levels of it."""

from collections.abc import Iterator

import numpy as np
import platformdirs
import pytest
import torch

from evosweep.cli.compose import build
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import SettingError
from evosweep.core.events import Silent
from evosweep.data.tokens import TokenSplit
from evosweep.evaluate.population import Evaluator
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.models.anatomy import Anatomy
from evosweep.models.dropping import Drop
from evosweep.models.load import LoadedModel
from evosweep.store.build import StoreBuilder
from evosweep.store.store_plan import plan_store
from tests.test_compose import composed

pytestmark = pytest.mark.slow
TEXT = (
    "Anarchism is a political philosophy and movement that is skeptical of all justifications for authority and seeks "
    "to abolish the institutions it claims maintain unnecessary coercion and hierarchy, typically including, though "
    "not necessarily limited to, governments, nation states, and capitalism. Anarchism advocates for the replacement "
    "of the state with stateless societies or other forms of free associations."
)


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:  # downloads are kept where users keep them
        patch.setenv("EVOSWEEP_CACHE", platformdirs.user_cache_dir("evosweep", appauthor=False))
        source = build(composed("model=gemma3_270m", "model.accept_terms=true"), "model")
        return source.load(progress=Silent())


def test_terms_must_be_accepted() -> None:
    with pytest.raises(SettingError) as caught:
        build(composed("model=gemma3_270m"), "model")
    assert str(caught.value) == (
        "model.accept_terms must be true, which says that you accept the Gemma Terms of Use "
        "(https://ai.google.dev/gemma/terms), got False"
    )


def test_english_is_what_it_expects(gemma: LoadedModel) -> None:
    tokenizer = gemma.tokenizer
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and tokenizer.decode(ids[0, 1:]) == TEXT
    with torch.inference_mode():
        loss = gemma.model(input_ids=ids, labels=ids).loss
        plain = gemma.model(input_ids=ids[:, 1:], labels=ids[:, 1:]).loss
    assert 10 < loss.exp() < 40 < plain.exp()  # Gemma reads text only behind <bos>
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(gemma.model.generate(prompt, max_new_tokens=8, do_sample=False)[0])
    assert "the capital of" in text or "Paris" in text
    assert gemma.source is not None and gemma.source.size_mb == pytest.approx(253.1, abs=0.1)


@pytest.fixture
def two_blocks(gemma: LoadedModel) -> Iterator[LoadedModel]:
    """Its first two blocks: norms before and after each sub-block, norms of queries and keys, a sliding window."""
    model = gemma.model.model
    layers = model.layers
    blocks = model.config.num_hidden_layers
    model.layers = layers[:2]
    model.config.num_hidden_layers = 2
    yield gemma
    model.layers = layers
    model.config.num_hidden_layers = blocks


def test_levels_and_dropping_of_it_can_be_scored(two_blocks: LoadedModel) -> None:
    gemma = two_blocks
    ids = np.asarray(gemma.tokenizer(TEXT).input_ids[:33])[None]
    split = TokenSplit("search", ids, ("anarchism",))
    anatomy = Anatomy(gemma.model)
    plan = plan_store(anatomy, RoundToNearest(bits=[3, 8], group=32), Drop(granularity="sublayers"))
    store = StoreBuilder(layer_errors=False).open(plan, split, model_name=gemma.name)
    evaluator = Evaluator(anatomy=anatomy, store=store, splits={"search": split})
    kept = np.array([len(unit.levels) - 1 for unit in store.units])
    low = np.where([unit.gates != () for unit in store.units], kept, 0)
    dropped = kept.copy()
    dropped[next(index for index, unit in enumerate(store.units) if unit.gates)] = 0
    found = evaluator.score(np.stack([kept, low, dropped]), split="search", windows=[0], fitness=[KL(), Perplexity()])
    eight, three, without = found["kl"]
    assert 0 < eight < 0.05 and eight < three and without > 0.1
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        logits = gemma.model(input_ids=tokens).logits[0].float()
        assert torch.allclose(evaluator.logits(None, tokens), logits, atol=0.01 * float(logits.abs().max()))
