"""Divides a device's memory among targets, weights and activations before anything is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evosweep.core.checks import check_bool, check_choice, check_int, check_number
from evosweep.core.errors import EvosweepError, SettingError
from evosweep.core.unit import Unit
from evosweep.models.activations import CHOICES, NONE
from evosweep.models.anatomy import Anatomy
from evosweep.models.device import free_bytes
from evosweep.models.expert_slots import RoutedSlot

FREE_SHARE = 0.85  # of free memory is used, where memory_gb is not given
TARGETS_SHARE = 0.1
WEIGHTS_SHARE = 0.6
HOST_SHARE = 0.5  # of free host memory may be page-locked
MOST_ACTIVATIONS = {"cpu": 1e9, "cuda": 32e9}  # larger batches make nothing faster
ACTIVATION_COPIES = 12  # fp32 tensors of hidden size alive in a block per token: residual, q/k/v, gate, up, scores ...


class Resources:
    """The resources that scoring may use.

    Args:
        memory_gb: Most memory of the model's device for levels, the dense model's outputs and activations together;
            null: what is free.
        compile: Whether torch compiles norms and the head's reduction, which takes some seconds; null: on CUDA.
        tf32: Whether CUDA may multiply fp32 matrices in TF32.
        sensitivity_tokens: Tokens that each unit is measured on, for samplers that need it.
        activations: What the inputs of compressed layers are rounded to while candidates are scored: ``none``; ``int8``
            or ``fp8`` with a scale for each token; ``int8_static`` or ``fp8_static`` with one for each layer, from the
            store's ``input_ranges``. The dense model that they are compared with always runs as it is.
        mq_bench: File of scored allocations that ``sampler=emq`` chooses its formula by; null: it scores some.
    """

    def __init__(
        self,
        *,
        memory_gb: float | None = None,
        compile: bool | None = None,
        tf32: bool = True,
        sensitivity_tokens: int = 1024,
        activations: str = NONE,
        mq_bench: str | None = None,
    ) -> None:
        self.memory = None if memory_gb is None else 1e9 * check_number("memory_gb", memory_gb, low=0, exclusive=True)
        self.compile = None if compile is None else check_bool("compile", compile)
        self.tf32 = check_bool("tf32", tf32)
        self.sensitivity_tokens = check_int("sensitivity_tokens", sensitivity_tokens, low=1)
        self.activations = check_choice("activations", activations, CHOICES)
        self.mq_bench = None if mq_bench is None else _existing("mq_bench", mq_bench)

    def compiles(self, device: torch.device) -> bool:
        """Return whether scoring compiles its kernels on a device: as ``compile`` says, else on CUDA alone."""
        return device.type == "cuda" if self.compile is None else self.compile


def _existing(name: str, path: str) -> Path:
    """Return the path of a file; raise SettingError where there is none."""
    if not isinstance(path, str) or not Path(path).is_file():
        raise SettingError(name, allowed="a file that exists, or null", got=path)
    return Path(path).absolute()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the device's memory for each purpose, and where packed levels are kept.

    Attributes:
        dense: Bytes for dequantized weights; those used last are kept.
        packed: ``device``, ``host`` (page-locked, the next block's copied while a block runs), ``disk`` (memory-
            mapped); ``nowhere`` if all dequantized weights fit, so that each is read once.
        activations: Bytes for the activations of a block.
        targets: Bytes for what fitness needs of the dense model.
    """

    dense: float
    packed: str
    activations: float
    targets: float

    @classmethod
    def of(cls, resources: Resources, device: torch.device, *, dense: int, packed: int, candidate: int) -> "MemoryPlan":
        """Return the plan for the memory that is free now.

        Args:
            resources: What scoring may use.
            device: The model's device.
            dense: Bytes of all levels dequantized.
            packed: Bytes of all levels as stored.
            candidate: Bytes of activations of one candidate on one window.

        Raises:
            SettingError: There is no room for one candidate on one window.
        """
        memory = resources.memory or FREE_SHARE * free_bytes(device)
        targets = TARGETS_SHARE * memory
        room = WEIGHTS_SHARE * memory
        if dense <= room:
            weights = float(dense)
            packed_in = "nowhere"
            taken = float(dense)
        elif packed <= room and device.type != "cpu":  # a CPU's packed levels are in its file cache anyway
            weights = room - packed
            packed_in = "device"
            taken = room
        else:
            hosts = device.type != "cpu" and packed <= HOST_SHARE * free_bytes(torch.device("cpu"))
            weights = room / 2
            packed_in = "host" if hosts else "disk"
            taken = room
        left = memory - targets - taken
        if left < candidate:
            least = candidate / (1 - TARGETS_SHARE - WEIGHTS_SHARE)
            gigabytes = f"{memory / 1e9:.3g}"
            raise SettingError(
                "memory_gb",
                owner=resources,
                got=f"{gigabytes} (free)" if resources.memory is None else float(gigabytes),
                allowed=f"at least {least / 1e9:.3g}, for one candidate on one window (or a smaller tokens.seq_len)",
            )
        return cls(weights, packed_in, min(left, MOST_ACTIVATIONS[device.type]), targets)


def per_token(anatomy: Anatomy) -> int:
    """Return the bytes of activations that one token of one candidate takes in a block."""
    width = int(anatomy.head.weight.shape[1]) * 4 * ACTIVATION_COPIES
    mixtures: dict[int, float] = {}  # by module: inputs and outputs of all matrices that a token meets
    for slot in anatomy.slots:
        if isinstance(slot, RoutedSlot):
            met = slot.share * sum(slot.shape) * anatomy.dtype.itemsize
            module = id(slot.mixture.module)
            mixtures[module] = mixtures.get(module, 0.0) + met
    return width + int(max(mixtures.values(), default=0.0))


def plan_memory(resources: Resources, anatomy: Anatomy, units: Sequence[Unit], *, seq_len: int) -> MemoryPlan:
    """Return the memory plan for scoring some units.

    Args:
        resources: What scoring may use.
        anatomy: The model.
        units: Units with their levels' costs, compressed or only planned.
        seq_len: Tokens of the longest window.

    Raises:
        SettingError: There is no room for one candidate on one window.
    """
    layers = [unit for unit in units if not unit.gates]
    if resources.activations != NONE and any(isinstance(slot, RoutedSlot) for slot in anatomy.slots):
        raise SettingError(
            "activations",
            owner=resources,
            allowed=f"{NONE} for a mixture of experts, whose inputs cannot be rounded yet",
            got=resources.activations,
        )
    return MemoryPlan.of(
        resources,
        anatomy.device,
        candidate=per_token(anatomy) * seq_len,
        dense=sum(unit.numel * len(unit.levels) for unit in layers) * anatomy.dtype.itemsize,
        packed=sum(level.cost for unit in layers for level in unit.levels) // 8,
    )


def chunks(rows: int, shape: tuple[int, ...], *, tokens_at_once: int) -> list[tuple[slice, slice]]:
    """Return (genomes, windows) as chunks whose activations fit, whole populations first.

    Args:
        rows: Genomes.
        shape: (windows, tokens of each).
        tokens_at_once: Tokens of all genomes that fit.
    """
    at_once = max(1, tokens_at_once // shape[1])
    some_rows = min(rows, at_once)
    some_windows = max(1, at_once // some_rows)
    return [
        (slice(row, min(row + some_rows, rows)), slice(start, min(start + some_windows, shape[0])))
        for start in range(0, shape[0], some_windows)
        for row in range(0, rows, some_rows)
    ]


def halves(rows: slice, span: slice, seq_len: int, error: torch.OutOfMemoryError) -> list[tuple[slice, slice]]:
    """Return a chunk of ``chunks`` that did not fit as two, fewer rows each or else fewer windows.

    Args:
        rows: Of the population.
        span: Of windows.
        seq_len: Tokens of a window.
        error: What was raised.

    Raises:
        EvosweepError: It is one row on one window.
    """
    for part, whole, by_rows in ((rows, span, True), (span, rows, False)):
        if part.stop - part.start > 1:
            middle = (part.start + part.stop) // 2
            both = slice(part.start, middle), slice(middle, part.stop)
            return [(half, whole) if by_rows else (whole, half) for half in both]
    raise EvosweepError(
        f"one candidate on one window of {seq_len} tokens does not fit the device's memory; "
        "lower evaluate.memory_gb or tokens.seq_len"
    ) from error
