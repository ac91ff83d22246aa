"""Chains of small operations that torch compiles into one: norms, rotary embeddings, the reduction of logits.

Compiling needs a C compiler on the machine; where it fails, the same operations run one by one.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from evosweep.models.head import linear_fp32

logger = logging.getLogger(__name__)
ROTARY = "apply_rotary_pos_emb"
# Hidden size. Storing logits costs the same for any; on an H100 the kernel takes 0.4 times as long for 576, but 1.0 to
# 1.15 times for 4096, where the vendor's product is the faster one.
WIDEST_KERNEL = 2560


def logits_and_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 logits (tokens, vocabulary) and their log Σ exp (tokens,).

    Args:
        hidden: Final hidden states (tokens, hidden).
        weight: Rows of the head's matrix (vocabulary, hidden).
        bias: Its bias (vocabulary,), or None.
        compiled: Whether the reduction is one compiled pass, so that no second copy of the logits is made.
    """
    logits = linear_fp32(hidden, weight, bias)
    return logits, (_compiled_sum() if compiled else _sum)(logits)


def _sum(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits, dim=1)


@functools.cache
def _compiled_sum() -> Callable[[torch.Tensor], torch.Tensor]:
    return _or_plain(torch.compile(_sum, dynamic=True), _sum)


def head_kernel_for(factor: torch.Tensor) -> ModuleType | None:
    """Return the module of the linear head's GPU kernels where they run and pay; None where logits are to be stored.

    They are for half-precision factors on CUDA; fp32 products would be rounded to tf32.

    Args:
        factor: Hidden states or the head's matrix, shape (any, hidden).
    """
    half = factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)
    return _working_head_kernel(factor.device, factor.dtype) if half and factor.shape[1] <= WIDEST_KERNEL else None


@functools.cache
def _working_head_kernel(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    try:
        from evosweep.models import head_kernel  # noqa: PLC0415 - torch for CPUs comes without Triton

        rows = torch.linspace(-1, 1, 16 * 192, device=device).view(16, 192).to(dtype)
        labels = torch.arange(16, device=device)
        logits = rows.float() @ rows.float().T
        close = functools.partial(torch.allclose, atol=0.1, rtol=1e-2)  # tf32 may be allowed
        if not close(head_kernel.logsumexp(rows, rows, None), logits.logsumexp(dim=1)):
            raise ArithmeticError("a wrong sum")
        if not close(head_kernel.label_logits(rows, rows, None, labels), logits.diagonal()):
            raise ArithmeticError("a wrong logit")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's failures are of many kinds
        logger.warning("Triton does not work here (%s); the output head is computed slower", type(error).__name__)
        return None
    return head_kernel


def compile_norms(blocks: nn.Module) -> None:
    """Compile every norm in some blocks: modules without children whose weights are all vectors."""
    norms = [module for module in blocks.modules() if _is_norm(module)]
    for kind in {type(norm) for norm in norms}:
        forward = _or_plain(torch.compile(kind.forward, dynamic=True), kind.forward)
        for norm in norms:
            if type(norm) is kind:
                norm.forward = _Compiled(forward, norm)


class _Compiled(functools.partial):  # type: ignore[type-arg]
    """A norm's compiled forward, so that it is known from one that was replaced for another reason."""


@contextmanager
def plain_norms(blocks: nn.Module) -> Iterator[None]:
    """Run norms that were compiled uncompiled while the context lasts: compiled code has no second derivatives."""
    compiled = {module: vars(module)["forward"] for module in blocks.modules() if _is_compiled(module)}
    for module in compiled:
        del module.forward
    try:
        yield
    finally:
        for module, forward in compiled.items():
            module.forward = forward


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _Compiled)


@contextmanager
def fused_rotary(blocks: nn.Module) -> Iterator[None]:
    """Compile the rotary embeddings of some blocks to one pass while the context lasts, where they have any.

    transformers calls them by one name from the module that defines a model's attention. All sizes except the batch's
    are constants of the compiled code: with dynamic sizes it is hardly faster than the single operations.
    """
    sources = {sys.modules[type(module).__module__] for module in blocks.modules()}
    plain = {source: getattr(source, ROTARY) for source in sources if hasattr(source, ROTARY)}
    try:
        for source, function in plain.items():
            setattr(source, ROTARY, _rotary(function))
        yield
    finally:
        for source, function in plain.items():
            setattr(source, ROTARY, function)


@functools.cache
def _rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = _or_plain(torch.compile(plain), plain)

    def call(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for tensor in (query, key):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(query, key, *args, **kwargs)

    return call


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.parameters())
    leaf = next(module.children(), None) is None
    return leaf and bool(weights) and all(weight.dim() == 1 for weight in weights)


def _or_plain(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs the compiled one, and the plain one from the first failure on."""
    broken = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal broken
        if not broken:
            try:
                return compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler's failures are of many kinds
                broken = True
                logger.warning("torch.compile does not work here (%s); running uncompiled", type(error).__name__)
        return plain(*args, **kwargs)

    return call
