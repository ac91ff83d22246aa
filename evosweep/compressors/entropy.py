"""GPTQ with steps by column importance and entropy-coded values: levels of exactly so many bits a weight.

With UᵀU = (H + damping·1)⁻¹, GPTQ's error is Σⱼ ‖eⱼ‖² / Uⱼⱼ², where eⱼ is what rounding column j changes. At a given
entropy the sum is least where all columns add the same to it, so a column's step is in proportion to Uⱼⱼ (reverse
water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3; for GPTQ: Lifar et al., WaterSIC, arXiv
2603.04956). Uniform steps with an entropy code are within 0.25 bits of what any code can do (Gish and Pierce, 1968),
and need neither a rotation nor scales of groups: the code makes use of rows and columns that spread unequally.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.code_tables import LEAST, MOST, code_tables
from evosweep.compressors.compensate import Factor, factorize, spans_of, sums_by_matrix, sweep
from evosweep.compressors.entropy_steps import StepRules, finalize_steps
from evosweep.compressors.formats import entropy_int
from evosweep.compressors.formats.entropy_int import Spreads
from evosweep.compressors.payload import Payload
from evosweep.compressors.statistics import SECOND_MOMENT, Statistics
from evosweep.core.checks import check_int, check_number
from evosweep.core.errors import SettingError, StoreError
from evosweep.core.unit import Nominal

FEWEST_BITS = 0.75  # a weight's code takes at least half a bit, and rows and columns need theirs
MOST_BITS = 7
BELOW = 22  # quarter octaves below the median that a column's step may be; others end at 31 above the finest
SLACK = 0.004  # bits a weight that a first guess stays below the target
WASTE = 0.006  # bits a weight that may stay unused
PILOT_ROWS = 96  # of a layer, at least, on which a first guess is tried
TRIES = 8
FINENESS = np.arange(-20, 12, 1 / 16)  # log2 of the widest row's spread over the layer's step: all zeros to 12 bits


@dataclass(frozen=True)
class EntropySpec:
    """A level of entropy-coded values.

    Attributes:
        bits: Bits a weight, everything counted.
        size: Bytes.
    """

    bits: float
    size: int


class EntropyCoded:
    """Error-compensating rounding to whole multiples of a step, in Huffman code, at any number of bits a weight.

    Args:
        bits: Bits a weight of each level, everything counted, from 0.75 to 7, rising; fractions are fine.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        column_block: Columns between two updates of the columns that follow.
    """

    needs = frozenset({SECOND_MOMENT})

    def __init__(
        self, *, bits: Sequence[float] = (2, 2.5, 3, 3.5, 4, 5), damping: float = 0.01, column_block: int = 64
    ) -> None:
        self.bits = check_rates(bits)
        self.damping = check_number("damping", damping, low=0, high=1, exclusive=True)
        self.column_block = check_int("column_block", column_block, low=1)

    def plan(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[LevelSpec]]:
        """Return one level a number of bits, named ``2.5bit_coded``.

        Raises:
            SettingError: A layer is so small that a level has no room for its codes.
        """
        return {name: [self._level(name, shape, bits) for bits in self.bits] for name, shape in shapes.items()}

    def _level(self, name: str, shape: tuple[int, int], bits: float) -> LevelSpec:
        rows, columns = shape
        size = math.floor(bits * rows * columns / 8)
        least = entropy_int.side_bits(rows=rows, columns=columns) + 0.6 * rows * (columns + 1)
        if 8 * size < least:
            raise SettingError(
                "bits",
                owner=self,
                allowed=f"at least {math.ceil(100 * least / (rows * columns)) / 100} for layers as small as {name}",
                got=bits,
            )
        return LevelSpec(f"{bits:g}bit_coded", 8 * size, Nominal("bits", float(bits)), EntropySpec(bits, size))

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping, or a layer does not fit its size.
        """
        levels = [(name, level) for name in weights for level in plans[name]]
        layers = {name: Layer.of(weight, statistics.second_moment) for name, weight in weights.items()}
        shared = Columns.of(statistics.second_moment, self.damping)
        made = fitted(
            [Job(layers[name], level.spec.size) for name, level in levels], shared, column_block=self.column_block
        )
        result: dict[str, dict[str, Payload]] = {name: {} for name in weights}
        for (name, level), rounded in zip(levels, made, strict=True):
            tensors = entropy_int.encode(
                numbers=rounded.numbers, spreads=rounded.spreads, step=rounded.step, size=level.spec.size
            )
            meta = {"rows": weights[name].shape[0], "columns": weights[name].shape[1]}
            result[name][level.name] = Payload(entropy_int.__name__, tensors, meta, error=rounded.error)
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        return {"bits": self.bits, "damping": self.damping, "column_block": self.column_block}


def check_rates(bits: object) -> list[float]:
    """Return the numbers of bits that the argument ``bits`` lists, rising.

    Raises:
        SettingError: They are no such list.
    """
    rates: list[float] = list(bits) if isinstance(bits, Sequence) and not isinstance(bits, str) else [bits]  # type: ignore[list-item]
    if not rates:
        raise SettingError("bits", allowed=f"a list of numbers from {FEWEST_BITS} to {MOST_BITS}", got=rates)
    for rate in rates:
        check_number("bits", rate, low=FEWEST_BITS, high=MOST_BITS)
    if rates != sorted(set(rates)) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise SettingError("bits", allowed="rising, each number once", got=rates)
    return rates


@dataclass(frozen=True)
class Columns:
    """What layers share that share an input.

    Attributes:
        factor: Of the second moment of inputs that are scaled by the columns' steps, without its damping.
        steps: Of each column, in quarter octaves, whole, shape (columns,).
        factors: The same as factors, 2^(steps / 4), fp32.
        damping: What was added to every entry of the second moment's diagonal.
    """

    factor: Factor
    steps: torch.Tensor
    factors: torch.Tensor
    damping: float

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float) -> "Columns":
        """Return steps in proportion to the diagonal of the inverse Hessian's factor.

        Raises:
            StoreError: The Hessian cannot be factorized.
        """
        alive = gram.diagonal() != 0
        factor = factorize(gram, damping=damping)
        wanted = (4 * factor.upper.diagonal().log2()).round_()
        known = wanted[alive] if bool(alive.any()) else wanted
        finest = torch.maximum(known.amin(), known.median() - BELOW)
        steps = torch.where(alive, wanted - finest, 0).clamp_(0, 2**entropy_int.STEP_WIDTH - 1).long()
        factors = entropy_int.column_factors(steps)
        return cls(Factor((factor.upper / factors).contiguous(), 0.0), steps, factors, factor.damping)


@dataclass(frozen=True)
class Layer:
    """A weight and how it spreads.

    Attributes:
        weight: fp32, shape (rows, columns), zero where the input always is.
        spread: log2 of the widest row's spread; −inf for a weight of zeros.
        rows: Quarter octaves below the widest row, 0 to 15, shape (rows,).
        columns: Of a column's weights, over the layer's, −4 to 3, shape (columns,).
    """

    weight: torch.Tensor
    spread: float
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, gram: torch.Tensor) -> "Layer":
        """Return a weight with the spreads s and t of rows and columns for which w² is about (s·t)².

        Args:
            weight: Shape (rows, columns).
            gram: Second moment of its input.
        """
        weight = torch.where(gram.diagonal() == 0, 0.0, weight.float())
        square = weight.square()
        by_column = torch.ones_like(square[0])
        for _ in range(2):
            by_row = (square / by_column).mean(dim=1).clamp_(min=1e-30)
            by_column = (square / by_row[:, None]).mean(dim=0).clamp_(min=2.0**-6)
        rows = (2 * by_row.log2()).round_()
        widest = float(rows.amax()) / 4 if bool(square.any()) else -math.inf
        classes = (rows.amax() - rows).clamp_(0, 2**entropy_int.ROW_WIDTH - 1)
        middle = entropy_int.MIDDLE_SPREAD
        columns = (2 * by_column.log2()).round_().clamp_(-middle, 2**entropy_int.SPREAD_WIDTH - 1 - middle)
        return cls(weight, widest, classes.long(), columns.long())

    def drawn(self, log_step: float) -> torch.Tensor:
        """Return how far each row's values are drawn towards zero where the column's step is that of the layer.

        See ``StepRules``; that columns spread differently is left out.
        """
        if not math.isfinite(self.spread):
            return torch.zeros(len(self.weight), device=self.weight.device)
        return 2.0 ** (self.rows / 2 - 2 * (self.spread - log_step)) / 12


@dataclass(frozen=True)
class Job:
    """A layer that is to be coded at one size.

    Attributes:
        layer: Its weights and their statistics.
        size: Bytes that codes, scales and tables take together.
    """

    layer: Layer
    size: int

    @property
    def bits(self) -> float:
        """Bits a weight that are left for codes."""
        rows, columns = self.layer.weight.shape
        return (8 * self.size - entropy_int.side_bits(rows=rows, columns=columns)) / (rows * columns)

    def pilot(self) -> "Job":
        """Return the job for some of its rows, evenly spaced; only its bits a weight have a meaning."""
        every = max(1, len(self.layer.weight) // PILOT_ROWS)
        few = replace(self.layer, weight=self.layer.weight[::every], rows=self.layer.rows[::every])
        return Job(few, self.size)


@dataclass(frozen=True)
class Rounded:
    """A layer rounded to whole multiples of its columns' steps.

    Attributes:
        numbers: The multiples, shape (rows, columns).
        spreads: By which they are coded.
        step: The layer's step, a value of fp16, shape ().
        error: Output error.
        bits: Bits of the codes, a weight.
    """

    numbers: torch.Tensor
    spreads: Spreads
    step: torch.Tensor
    error: float
    bits: float


class Rates:
    """Expected bits a weight of a layer, by the step it is rounded with; from spreads alone.

    Args:
        layer: The layer.
        steps: Of its columns, in quarter octaves.
    """

    def __init__(self, layer: Layer, steps: torch.Tensor) -> None:
        counts = [torch.bincount(layer.rows), torch.bincount(layer.columns - steps + 64)]
        rows, columns = (count.double().cpu().numpy() for count in counts)
        shares = np.convolve(rows[::-1] / rows.sum(), columns / columns.sum())
        context = np.arange(len(shares)) - (len(rows) - 1) - 64.0 + 4 * FINENESS[:, None]  # of spread over step
        curve = code_tables(torch.device("cpu")).rate.numpy()
        self.bits: npt.NDArray[np.float64] = np.interp(context, np.arange(LEAST, MOST + 1), curve) @ shares
        self.spread = layer.spread if math.isfinite(layer.spread) else 0.0

    def at(self, log_step: float) -> float:
        """Return expected bits a weight for a layer's step, given as log2."""
        return float(np.interp(self.spread - log_step, FINENESS, self.bits))

    def step_for(self, bits: float) -> float:
        """Return log2 of the step at which so many bits a weight are expected."""
        return self.spread - float(np.interp(bits, self.bits, FINENESS))


def fitted(jobs: Sequence[Job], shared: Columns, *, column_block: int) -> list[Rounded]:
    """Return every job's layer rounded with the finest step that was found whose codes fit the job's size.

    A first guess comes from the layer's spreads, corrected by what some of its rows take. Then steps of layers that do
    not fit, or leave more than WASTE unused, are corrected by what they took.

    Args:
        jobs: Layers that share an input, and sizes.
        shared: Of their input.
        column_block: Columns whose effect on later columns is applied at once.

    Raises:
        StoreError: A layer's codes do not fit its size at any step that was tried.
    """
    by_layer = {id(job.layer): Rates(job.layer, shared.steps) for job in jobs}
    rates = [by_layer[id(job.layer)] for job in jobs]
    goal = [job.bits - SLACK for job in jobs]
    log_steps = [rate.step_for(bits) for rate, bits in zip(rates, goal, strict=True)]
    pilots = [job.pilot() for job in jobs]
    trial = rounded(pilots, shared, log_steps, column_block=column_block)
    of_pilots = {id(job.layer): Rates(pilot.layer, shared.steps) for job, pilot in zip(jobs, pilots, strict=True)}
    more = [
        found.bits - of_pilots[id(job.layer)].at(log_step)
        for found, job, log_step in zip(trial, jobs, log_steps, strict=True)
    ]  # bits a weight than the spreads say
    best: list[Rounded | None] = [None] * len(jobs)
    again = list(range(len(jobs)))
    for attempt in range(TRIES):
        for index in again:
            log_steps[index] = rates[index].step_for(goal[index] - (attempt // 3) * SLACK - more[index])
        trial = rounded([jobs[i] for i in again], shared, [log_steps[i] for i in again], column_block=column_block)
        for index, found in zip(again, trial, strict=True):
            more[index] = found.bits - rates[index].at(log_steps[index])
            known = best[index]
            if found.bits <= jobs[index].bits and (known is None or found.bits > known.bits):
                best[index] = found
        again = [index for index in again if _unfit(best[index], jobs[index], attempt)]
        if not again:
            break
    missing = [job for job, found in zip(jobs, best, strict=True) if found is None]
    if missing:
        raise StoreError(f"a layer's codes do not fit into {missing[0].size} bytes; compressor.bits may be too few")
    return [found for found in best if found is not None]


def _unfit(found: Rounded | None, job: Job, attempt: int) -> bool:
    """Return whether a job is worth another try: always without a result, at first also for room left."""
    return found is None or (attempt < 2 and job.bits - found.bits > WASTE and bool(found.numbers.any()))


def rounded(jobs: Sequence[Job], shared: Columns, log_steps: Sequence[float], *, column_block: int) -> list[Rounded]:
    """Return layers rounded with their steps, column by column, each column's error moved onto those after it.

    The loop runs in units of the columns' steps.

    Args:
        jobs: Layers that share an input.
        shared: Of their input.
        log_steps: log2 of each layer's step.
        column_block: Columns whose effect on later columns is applied at once.
    """
    sizes = [len(job.layer.weight) for job in jobs]
    device = shared.factors.device
    steps = (2.0 ** torch.tensor(log_steps, device=device)).half().clamp(min=2.0**-24, max=65504).float()
    scale = steps.repeat_interleave(torch.tensor(sizes, device=device))
    by_row = torch.cat([job.layer.drawn(log_step) for job, log_step in zip(jobs, log_steps, strict=True)])
    work = torch.cat([job.layer.weight.T for job in jobs], dim=1).div_(shared.factors[:, None])
    before = work.clone()
    total = sweep(
        work,
        shared.factor,
        spans=spans_of(len(work), edges=len(work), block=column_block),
        rules=lambda columns: StepRules(scale, by_row, shared.factors[columns].square()),
        finalize=finalize_steps,
    )
    changes = before.sub_(work).mul_(shared.factors[:, None]).square_().sum(dim=0)
    errors = sums_by_matrix(total.sub_(changes, alpha=shared.damping).clamp_(min=0), sizes)
    numbers = [matrix.T.round().int() for matrix in work.div_(scale).split(sizes, 1)]
    spreads = _spreads([job.layer for job in jobs], shared.steps, numbers, steps.log2().tolist())
    taken = torch.stack([entropy_int.coded_bits(*pair) for pair in zip(numbers, spreads, strict=True)]).tolist()
    rates = [bits / number.numel() for bits, number in zip(taken, numbers, strict=True)]
    return [Rounded(*facts) for facts in zip(numbers, spreads, steps, errors, rates, strict=True)]


def _spreads(
    layers: Sequence[Layer], steps: torch.Tensor, numbers: Sequence[torch.Tensor], log_steps: Sequence[float]
) -> list[Spreads]:
    """Return the spreads of layers' numbers: those of the weights, made as much wider as the numbers are.

    Args:
        layers: The layers.
        steps: Of their columns.
        numbers: Of each layer, shape (rows, columns).
        log_steps: log2 of each layer's step.
    """
    square = torch.float64
    found = [number.square().sum(dtype=square) - number.numel() / 12 for number in numbers]
    expected = [
        (2.0 ** (-layer.rows / 2)).sum(dtype=square) * (2.0 ** ((layer.columns - steps) / 2)).sum(dtype=square)
        for layer in layers
    ]
    ratios = (torch.stack(found) / torch.stack(expected)).tolist()
    result = []
    for layer, ratio, log_step in zip(layers, ratios, log_steps, strict=True):
        least = 2.0 ** (2 * (layer.spread - log_step)) / 8 if math.isfinite(layer.spread) else 0.0
        widest = 2 * math.log2(max(ratio, least, 2.0**LEAST))
        result.append(Spreads(layer.rows, layer.columns, steps, max(LEAST, min(127, round(widest)))))
    return result
