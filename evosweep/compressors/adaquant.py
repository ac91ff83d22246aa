"""AdaQuant (Hubara et al., arXiv 2006.10518, section 3): codes and grids learned against the layer's output error.

The levels of another compressor are the start; what is learned has the same format and the same bits, and its output
error is never larger.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from evosweep.compressors.base import LevelSpec, Plans
from evosweep.compressors.compensate import stack_transposed, sums_by_matrix
from evosweep.compressors.descent import descend
from evosweep.compressors.formats.grouped_int import unpack
from evosweep.compressors.gptq import GPTQ
from evosweep.compressors.grid import largest_codes
from evosweep.compressors.payload import Payload
from evosweep.compressors.rounding import Learned, Rounding, Target, improve
from evosweep.compressors.rtn import RoundToNearest
from evosweep.compressors.statistics import Statistics
from evosweep.compressors.straight_through import learn_by_gradient
from evosweep.core.checks import check_choice, check_int
from evosweep.core.errors import SettingError

METHODS = ("descent", "gradient")
STARTS = ("gptq", "nearest")
LEARNABLE = ("rounding", "scales")


class AdaQuant(GPTQ):
    """GPTQ's levels, their codes, scales and zeros learned further against the output error of their layer.

    Args:
        start: What the codes are at first: ``gptq``, or ``nearest`` of the min-max grid.
        method: ``descent`` gives every code, scale and zero in turn its best value (QuantEase, arXiv 2309.01885);
            ``gradient`` is AdaQuant's own, Adam with gradients through the rounding.
        sweeps: Over all columns, of ``descent``.
        steps: Of Adam, of ``gradient``.
        learn: What is learned: ``rounding``, ``scales`` (with zeros, where they are not fixed), or both.
        **gptq: The settings of GPTQ.
    """

    def __init__(
        self,
        *,
        start: str = "gptq",
        method: str = "descent",
        sweeps: int = 4,
        steps: int = 200,
        learn: Sequence[str] = LEARNABLE,
        **gptq: Any,
    ) -> None:
        super().__init__(**gptq)
        self.start = check_choice("start", start, STARTS)
        self.method = check_choice("method", method, METHODS)
        self.sweeps = check_int("sweeps", sweeps, low=1)
        self.steps = check_int("steps", steps, low=1)
        self.learn = _check_learn(learn)

    def compress(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload of layers that share an input.

        Args:
            weights: fp32 weights (out, in) by unit name.
            statistics: The shared input's second moment.
            plans: What ``plan`` returned.

        Raises:
            StoreError: The second moment stays singular whatever the damping.
        """
        gram = statistics.second_moment
        starts = self._starts(weights, statistics, plans)
        jobs = [(name, level) for name in weights for level in plans[name]]
        sizes = [len(weights[name]) for name, _ in jobs]
        first = joined([starts[name][level.name] for name, level in jobs], sizes)
        damping = self.damping * float(gram.diagonal().mean())
        target = Target(stack_transposed([weights[name] for name, _ in jobs], gram), gram, damping)
        learned, errors = improve(first, target, self._method())
        return self._payloads(learned, sums_by_matrix(errors, sizes), jobs, sizes)

    def _starts(
        self, weights: Mapping[str, torch.Tensor], statistics: Statistics, plans: Plans
    ) -> dict[str, dict[str, Payload]]:
        """Return the payloads whose codes and grids are learned further."""
        if self.start == "gptq":
            return super().compress(weights, statistics, plans)
        nearest = RoundToNearest(
            bits=self.bits, group=self.group, symmetric=self.symmetric, coarse_scales=self.coarse_scales
        )
        nearest.search = self.search
        return nearest.compress(weights, statistics, plans)

    def _method(self) -> partial[Rounding]:
        learned = Learned(
            rounding="rounding" in self.learn,
            scales="scales" in self.learn,
            zeros=not self.symmetric,
            coarse=self.coarse_scales,
        )
        if self.method == "gradient":
            return partial(learn_by_gradient, steps=self.steps, learned=learned)
        return partial(descend, sweeps=self.sweeps, learned=learned, column_block=self.column_block)

    def _payloads(
        self,
        learned: Rounding,
        errors: Sequence[float],
        jobs: Sequence[tuple[str, LevelSpec]],
        sizes: Sequence[int],
    ) -> dict[str, dict[str, Payload]]:
        """Return unit -> level name -> payload.

        Args:
            learned: Codes and grids of all rows.
            errors: Output error of each job.
            jobs: Unit and level.
            sizes: Rows of each.
        """
        result: dict[str, dict[str, Payload]] = {}
        tables = (table.T.split(sizes) for table in (learned.codes, learned.scale, learned.zero))
        for (name, level), codes, scales, zeros, error in zip(jobs, *tables, errors, strict=True):
            result.setdefault(name, {})[level.name] = self.payload(
                codes=codes.to(torch.uint8), scales=scales, zeros=zeros, width=level.spec.bits, error=error
            )
        return result

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide payloads."""
        own = {"start": self.start, "method": self.method, "learn": self.learn}
        effort = {"steps": self.steps} if self.method == "gradient" else {"sweeps": self.sweeps}
        return {**super().describe(), **own, **effort}


def joined(payloads: Sequence[Payload], sizes: Sequence[int]) -> Rounding:
    """Return the codes and grids of integer payloads side by side.

    Args:
        payloads: Of the format ``grouped_int``, with the same columns and groups.
        sizes: Rows of each.
    """
    widths = [int(payload.meta["width"]) for payload in payloads]
    device = payloads[0].tensors["scales"].device
    codes = []
    zeros = []
    for payload, width in zip(payloads, widths, strict=True):
        rows, columns, group = (int(payload.meta[key]) for key in ("rows", "columns", "group"))
        codes.append(unpack(payload.tensors["codes"], width, rows * columns).view(rows, columns).T)
        shape = (rows, columns // group)
        if "zeros" in payload.tensors:
            zeros.append(unpack(payload.tensors["zeros"], width, rows * shape[1]).view(shape).T.float())
        else:
            zeros.append(torch.full(shape, 2.0 ** (width - 1), device=device).T)
    scale = torch.cat([payload.tensors["scales"].T.float() for payload in payloads], dim=1)
    top = largest_codes(widths, sizes, device)
    return Rounding(torch.cat(codes, dim=1).float(), scale, torch.cat(zeros, dim=1), top)


def _check_learn(learn: Any) -> list[str]:
    names = list(learn) if isinstance(learn, Sequence) and not isinstance(learn, str) else [learn]
    for name in names:
        check_choice("learn", name, LEARNABLE)
    if not names or len(set(names)) != len(names):
        raise SettingError("learn", allowed=f"some of {', '.join(LEARNABLE)}, each once", got=names)
    return names
