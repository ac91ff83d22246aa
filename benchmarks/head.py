"""The output head's log-sum-exp on a GPU: by stored logits in bfloat16 and in fp32, and by the kernel that stores none.

    python benchmarks/head.py [--shape 131072,576,49152] [--tile 128,256,64,8,3]

Prints, for each shape (tokens, hidden, vocabulary) and way, microseconds a thousand tokens, million tokens a second,
TFLOP/s of the product, and the largest difference from float64 on some of the tokens. A tile is tokens, vocabulary,
hidden, warps and stages of the kernel's blocks.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional

from evosweep.models import head_kernel
from evosweep.models.fused import logits_and_sum

SHAPES = [[131072, 576, 49152], [32768, 4096, 32000]]
CHUNK_BYTES = 4e9  # of fp32 logits at once, as the evaluator's chunks
CHECKED = 64  # tokens that are compared with float64

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def numbers(text: str) -> list[int]:
    """Return the integers of a comma-separated list."""
    return [int(number) for number in text.split(",")]


def in_chunks(chunk_sum: Way) -> Way:
    """Return a way that takes as many tokens at once as the stored logits leave room for."""

    def run(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        step = int(CHUNK_BYTES / (4 * len(weight)))
        return torch.cat([chunk_sum(some, weight) for some in hidden.split(step)])

    return run


def ways(tiles: list[list[int]], *, stored: bool) -> dict[str, Way]:
    """Return every way by name.

    Args:
        tiles: Blocks of the kernel; its own choice where there are none.
        stored: Whether ways that store logits are among them.
    """
    compiled = torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=1), dynamic=True)
    found: dict[str, Way] = {}
    if stored:
        found["bf16 logits"] = in_chunks(lambda hidden, weight: compiled(functional.linear(hidden, weight)))
        found["fp32 logits"] = in_chunks(lambda hidden, weight: logits_and_sum(hidden, weight, None, compiled=True)[1])
    for shape in tiles or [None]:
        tile = None if shape is None else head_kernel.Tile(*shape)
        name = "kernel" if shape is None else f"kernel {','.join(map(str, shape))}"
        found[name] = lambda hidden, weight, tile=tile: head_kernel.logsumexp(hidden, weight, None, tile=tile)
    return found


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call on the GPU."""
    times = []
    call()  # the first one allocates
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(shape: list[int], tiles: list[list[int]], *, stored: bool, repeats: int) -> None:
    """Print a line for every way on one shape.

    Args:
        shape: Tokens, hidden, vocabulary.
        tiles: Blocks of the kernel; its own choice where there are none.
        stored: Whether ways that store logits are among them.
        repeats: Calls whose median is printed.
    """
    tokens, width, vocabulary = shape
    label = "x".join(map(str, shape))
    draws = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", generator=draws).bfloat16()
    weight = (torch.randn(vocabulary, width, device="cuda", generator=draws) * 3 / width**0.5).bfloat16()
    exact = (hidden[:CHECKED].double() @ weight.double().T).logsumexp(dim=1)
    for name, way in ways(tiles, stored=stored).items():
        try:
            error = way(hidden, weight)[:CHECKED] - exact
            spent = milliseconds(functools.partial(way, hidden, weight), repeats)
        except Exception as problem:  # a tile that does not fit, among others that do
            print(f"{label} {name}: {type(problem).__name__} {str(problem)[:90]}")
            continue
        print(
            f"{label} {name}: {spent:.2f} ms, {1e6 * spent / tokens:.1f} us/1000 tokens, "
            f"{tokens / spent / 1e3:.2f} M tokens/s, {2e-9 * tokens * width * vocabulary / spent:.0f} TFLOP/s, "
            f"error at most {error.abs().max():.1e}, mean {error.mean():.1e}",
            flush=True,
        )
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=draws)
    spent = milliseconds(functools.partial(head_kernel.label_logits, hidden, weight, None, labels), repeats)
    print(f"{label} labels' logits: {spent:.3f} ms", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=numbers, action="append")
    parser.add_argument("--tile", type=numbers, action="append", default=[])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kernel-only", action="store_true")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in options.shape or SHAPES:
        measure(shape, options.tile, stored=not options.kernel_only, repeats=options.repeats)


if __name__ == "__main__":
    main()
