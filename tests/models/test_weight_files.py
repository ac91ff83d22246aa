"""Weight files that are not there, cut off, or no weights: refused by name before a tensor is read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evosweep import Budget, build_store, export, load_packed, make_problem, run_search
from evosweep.compressors.rtn import RoundToNearest
from evosweep.core.errors import ModelError
from evosweep.core.events import Silent
from evosweep.models.load import HuggingFace, weights_hash
from evosweep.store.units import Units

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(loaded, tmp_path: Path) -> Path:
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(loaded, tmp_path: Path) -> Path:
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    loaded.tokenizer.save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def load(path: Path, dtype: str = "float32"):
    return HuggingFace(path=str(path), dtype=dtype, device="cpu").load(progress=Silent()).model


def refusal(path: Path, dtype: str = "float32") -> str:
    with pytest.raises(ModelError) as found:
        load(path, dtype)
    assert "\n" not in str(found.value)
    return str(found.value)


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), name: value}, folder / WEIGHTS, metadata={"format": "pt"})


def test_shards_are_read_and_one_that_is_missing_is_named(sharded: Path, loaded) -> None:
    assert weights_hash(load(sharded)) == weights_hash(loaded.model)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3
    shards[1].unlink()
    one = refusal(sharded)
    assert one == f"model.path: {sharded} lacks {shards[1].name}, which {INDEX} names: copy the checkpoint again"
    shards[2].unlink()
    assert f"lacks {shards[1].name} and 1 more that {INDEX} names" in refusal(sharded)
    (sharded / INDEX).write_text("{")
    assert refusal(sharded) == f"model.path: {sharded / INDEX} is damaged: copy it again"


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_file_that_is_cut_off_is_named(folder: Path, kept: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    size = int(kept * len(content)) if 0 < kept < 1 else int(kept)
    (folder / WEIGHTS).write_bytes(content[:size])
    assert f"{folder / WEIGHTS}, {size} bytes, is cut off or no safetensors file" in refusal(folder)


def test_a_pointer_of_git_lfs_says_what_to_run(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 269060552\n")
    assert refusal(folder).endswith("is a Git LFS pointer, not the weights: run git lfs pull there")


def test_a_folder_without_weights_is_refused_and_one_with_pickled_tensors_is_read(folder: Path, loaded) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    assert f"{folder} has a config.json and no weights ({WEIGHTS}, or {INDEX}" in refusal(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert weights_hash(load(folder)) == weights_hash(loaded.model)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickled_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Touch(tmp_path / "it_ran")}, protocol=2))
    message = refusal(folder)
    assert message.endswith("its .bin files hold more than tensors, which is never loaded: give it as safetensors")
    assert "weights_only" not in message and not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(("dtype", "shown"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_codes_without_their_scales_are_not_taken_for_weights(folder: Path, dtype: torch.dtype, shown: str) -> None:
    change(folder, DOWN, torch.ones(32, 64).to(dtype))
    assert f"{DOWN} in {folder / WEIGHTS} has type {shown}, and config.json has no quantization" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, loaded, value: float) -> None:
    rows = loaded.model.get_input_embeddings().weight.detach().clone()
    rows[255, 3] = value  # the row of a token that no text has
    change(folder, "model.embed_tokens.weight", rows)
    assert f"{folder} has NaN or infinite values in model.embed_tokens.weight, read as float32" in refusal(folder)


def test_weights_that_only_overflow_in_half_precision_say_so(folder: Path, loaded) -> None:
    value = loaded.model.state_dict()[DOWN].clone()
    value[0, 0] = 1e6  # float16 ends at 65504
    change(folder, DOWN, value)
    assert f"in {DOWN}, read as float16: the checkpoint is damaged, or model.dtype is too narrow" in refusal(
        folder, "float16"
    )
    change(folder, DOWN, torch.full((32, 64), 3e38))  # each is a number, though their sum is none in float32
    assert float(load(folder).state_dict()[DOWN].max()) == pytest.approx(3e38)


def test_a_file_in_place_of_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    message = refusal(folder / WEIGHTS)
    assert message == f"model.path: {folder / WEIGHTS} is a file, not the folder of a model"
    shutil.copy(folder / WEIGHTS, tmp_path / "model.gguf")
    assert refusal(tmp_path / "model.gguf").endswith("a GGUF is not read, give the checkpoint that it was made from")


def test_a_key_that_is_missing_is_more_than_the_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such"}))
    assert refusal(folder).endswith("there is no 'no_such'")


def test_a_head_that_is_stored_beside_a_tied_embedding_stays_its_own(folder: Path, loaded, splits) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    notes: list[str] = []
    progress = Silent()
    progress.say = notes.append  # type: ignore[method-assign]
    again = HuggingFace(path=str(folder), dtype="float32", device="cpu").load(progress=progress)
    assert notes[-1].endswith("ties the head to the embedding, and its weights hold two: they stay two")
    assert again.model.config.tie_word_embeddings is False
    assert weights_hash(again.model) == weights_hash(loaded.model)
    eight = RoundToNearest(bits=[8], group=16)
    bench = build_store(again, splits, RoundToNearest(bits=[4], group=16), units=Units(embedding=eight, head=eight))
    problem = make_problem(bench, Budget(as_uniform=4))
    result = run_search(problem, bench, generations=1, stages=[{"survivors": 1, "tokens": 64}])
    packed = load_packed(export(result, bench, folder.parent / "packed")["path"])
    head = packed.get_output_embeddings().weight
    assert head is not packed.get_input_embeddings().weight
    torch.testing.assert_close(head, loaded.model.lm_head.weight, atol=0.01, rtol=0)
