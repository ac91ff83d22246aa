import pytest
import torch

from evosweep.core.errors import ModelError, SettingError
from evosweep.core.events import Silent
from evosweep.models.load import HuggingFace, Random, WheelGguf, weights_hash
from evosweep.testing.tiny import tiny_config

QUIET = Silent()


def test_a_saved_model_loads_as_it_was(loaded, tmp_path) -> None:
    loaded.model.save_pretrained(tmp_path / "m")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    again = HuggingFace(path=str(tmp_path / "m"), dtype="float32", device="cpu").load(progress=QUIET)
    assert weights_hash(again.model) == weights_hash(loaded.model)
    assert again.tokenizer("some text").input_ids == loaded.tokenizer("some text").input_ids
    assert not again.model.training


def test_random_models_follow_from_their_seed() -> None:
    hashes = [
        weights_hash(Random(name="r", config=tiny_config, seed=seed, device="cpu").load(progress=QUIET).model)
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_sees_every_weight(loaded) -> None:
    before = weights_hash(loaded.model)
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    old = weight[0, 0].clone()
    with torch.no_grad():
        weight[0, 0] += 1
        assert weights_hash(loaded.model) != before
        weight[0, 0] = old
    assert weights_hash(loaded.model) == before


def test_weights_of_another_type_are_held_in_it() -> None:
    model = Random(name="r", config=tiny_config, dtype="bfloat16", device="cpu").load(progress=QUIET).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32  # positions lose their order in bfloat16


def test_bytes_survive_the_byte_tokenizer(loaded) -> None:
    text = "naïve café — 試験\n\ttabs"
    ids = loaded.tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and loaded.tokenizer.decode(ids) == text


def test_a_damaged_copy_is_removed_so_that_the_next_try_works(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVOSWEEP_CACHE", str(tmp_path))
    source = WheelGguf(name="m", requirement="x==1", member="x", sha256="ab" * 32, device="cpu")
    copy = tmp_path / "models" / "m-abababababab"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged and has been removed; run again"):
        source.load(progress=QUIET)
    assert not copy.exists()


@pytest.mark.parametrize(("dtype", "device"), [("float31", "cpu"), ("float32", "gpu")])
def test_bad_settings_are_named(dtype: str, device: str) -> None:
    with pytest.raises(SettingError, match=r"^(dtype|device) must be"):
        HuggingFace(path="x", dtype=dtype, device=device)
