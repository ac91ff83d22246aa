"""Peak memory and time of the backward passes that measurements make, on a model of a given shape with random weights.

    python benchmarks/backward.py [--hidden 4096 --inner 11008 --layers 32 --heads 32 --vocabulary 32000]
        [--tokens 2048] [--dtype bfloat16] [--device cuda] [--passes squares,fisher,outputs,hutchinson,eigenvalue]

The default is Llama-7B's shape, its weights made on the device. squares: gradients of all weights, one layer's at a
time (hawq_v2, auto_scheme); fisher: these times what each of --levels levels changes (levels stand in as the weight
rounded to a tenth of its mean size); outputs: gradients of all outputs, none of weights (auto_quantize); hutchinson:
one product with the Hessian of every layer, in chunks of whole blocks (hawq_v2_pareto); eigenvalue: one product for one
layer of the first block, which is the dearest (hawq). The last two use 512 tokens at most. --again: blocks keep their
inputs alone and run twice, as where memory is short. On a GPU memory is the most that torch allocated, weights
included; on a CPU the process's largest resident set so far. A pass that does not fit says so, and the next one runs.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
import transformers

from benchmarks.settings import Clock, names, say
from evosweep.evaluate import backward, hessian
from evosweep.evaluate.backward import next_tokens, sampled_labels, visit_gradients, visit_outputs
from evosweep.models.anatomy import Anatomy


def made(arguments: argparse.Namespace) -> Anatomy:
    """Return a Llama of the shape, made on the device."""
    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=max(arguments.tokens, 64),
    )
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    with torch.device(arguments.device):
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return Anatomy(model)


def passes(anatomy: Anatomy, tokens: int, levels: int) -> dict[str, Callable[[], object]]:
    """Return one pass of each kind over one window.

    Args:
        anatomy: The model.
        tokens: Of the window.
        levels: Of each layer.
    """
    rng = torch.Generator(anatomy.device).manual_seed(0)
    ids = torch.randint(0, len(anatomy.head.weight), (1, tokens), generator=rng, device=anatomy.device)
    slots = anatomy.slots
    read: list[torch.Tensor] = []
    first = [slot for slot in slots if slot.block == 0]

    def times_changes(index: int, gradient: torch.Tensor) -> None:
        flat = gradient.float().flatten()
        dense = slots[index].read().detach().float()
        for level in range(levels):
            step = dense.abs().mean() * (level + 1) / 10
            change = ((dense / step).round() * step).to(anatomy.dtype).float() - dense
            read.append(torch.dot(flat, change.flatten()).double().square())

    return {
        "squares": lambda: visit_gradients(
            anatomy,
            slots,
            ids,
            loss=sampled_labels(0),
            visit=lambda _, gradient: read.append(gradient.float().square().sum()),
        ),
        "fisher": lambda: visit_gradients(anatomy, slots, ids, loss=sampled_labels(0), visit=times_changes),
        "outputs": lambda: visit_outputs(
            anatomy, slots, ids, loss=next_tokens, visit=lambda _, seen: read.append(seen[1].float().square().sum())
        ),
        "hutchinson": lambda: hessian.hutchinson(anatomy, slots, ids, 0),
        "eigenvalue": lambda: hessian.top_eigenvalue(
            hessian.Curvature(anatomy, first, ids), len(first) - 1, iterations=1, seed=0
        ),
    }


def measured(run: Callable[[], object], device: torch.device) -> dict[str, float | str]:
    """Return seconds and gigabytes of a pass, or that it does not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    try:
        run()
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    return {"seconds": round(seconds, 3), "peak_gb": round(most / 1e9, 2)}


def main() -> None:
    """Print a line of JSON for each kind of pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 4096, "inner": 11008, "layers": 32, "heads": 32, "vocabulary": 32000, "tokens": 2048}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--passes", type=names, default=["squares", "fisher", "outputs", "hutchinson", "eigenvalue"])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=80.0, help="after which no further pass begins")
    arguments = parser.parse_args()
    clock = Clock(arguments.seconds)
    if arguments.again:
        backward.SHARE = 0.0
    anatomy = made(arguments)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in anatomy.model.parameters())
    say(**{**vars(arguments), "device": str(anatomy.device), "weights_gb": round(weights / 1e9, 2)}, made=clock.seconds)
    kinds = passes(anatomy, arguments.tokens, arguments.levels)
    for name in arguments.passes:
        if clock.over:
            say(**{"pass": name, "left": True})
            continue
        say(**{"pass": name, **measured(kinds[name], anatomy.device)})


if __name__ == "__main__":
    main()
