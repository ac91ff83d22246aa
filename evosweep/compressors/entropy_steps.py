"""The column loop of entropy-coded values: rounding that weighs a value's error against the bits of its code."""

from dataclasses import dataclass

import torch

from evosweep.compressors.compensate import working_kernels

REACH = 2**15 - 1  # largest number of steps: what an escape holds


@dataclass(frozen=True)
class StepRules:
    """How a span of columns is rounded.

    The number n of steps with the least (x − n)² + λ·bits(n), where x is a weight in steps, is round(x / (1 + μ)) for
    the code of a normal distribution of spread s, whose words are n² / (2·ln 2·s²) bits longer than the shortest. At
    the slope of a fine quantizer's rate-distortion curve, λ = 2·ln 2 / 12, μ is 1 / (12·s²).

    Attributes:
        scale: Step of every row, fp32, shape (rows,).
        by_row: μ is ``by_row · by_column``; shape (rows,).
        by_column: Shape (columns of the span,).
    """

    scale: torch.Tensor
    by_row: torch.Tensor
    by_column: torch.Tensor


def finalize_steps(span: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, rules: StepRules) -> None:
    """Round the columns of a span in order, in place, moving each error onto later columns (GPTQ).

    Args:
        span: Weights transposed, fp32, contiguous, shape (columns, rows); holds the final values at the end.
        errors: Filled with each column's change divided by its pivot; same shape.
        factor: The span's block of U's diagonal, shape (columns, columns).
        rules: Steps, and how far values are drawn towards zero.
    """
    if span.is_cuda and working_kernels(span.device) is not None:
        from evosweep.compressors import entropy_kernel  # noqa: PLC0415 - torch for CPUs comes without Triton

        entropy_kernel.finalize_steps(span, errors, factor, **vars(rules), reach=REACH)
        return
    for column in range(len(span)):
        drawn = torch.addcmul(rules.scale, rules.scale * rules.by_row, rules.by_column[column])
        final = (span[column] / drawn).clamp_(-REACH, REACH).round_().mul_(rules.scale)
        torch.sub(span[column], final, out=errors[column]).div_(factor[column, column])
        span[column] = final
        if column + 1 < len(span):
            span[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
