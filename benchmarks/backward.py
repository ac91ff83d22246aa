"""Peak memory and time of the backward passes that measurements make, on a model of a given shape with random weights.

    python benchmarks/backward.py [--hidden 4096 --inner 11008 --layers 32 --heads 32 --vocabulary 32000]
        [--tokens 2048] [--dtype bfloat16] [--device cuda] [--passes squares outputs hutchinson eigenvalue]

The default is Llama-7B's shape. squares: gradients of all weights, one layer's at a time (fisher, hawq_v2,
auto_scheme); outputs: gradients of all outputs, none of weights (auto_quantize); hutchinson: one product with the
Hessian of every layer, in chunks of whole blocks (hawq_v2_pareto); eigenvalue: one product for one layer of the first
block, which is the dearest (hawq). --again: blocks keep their inputs alone and run twice, as where memory is short. On
a GPU memory is the most that torch allocated, weights included; on a CPU the process's largest resident set so far.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
import transformers

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


def passes(anatomy: Anatomy, tokens: int) -> dict[str, Callable[[], object]]:
    """Return one pass of each kind over one window.

    Args:
        anatomy: The model.
        tokens: Of the window.
    """
    rng = torch.Generator(anatomy.device).manual_seed(0)
    ids = torch.randint(0, len(anatomy.head.weight), (1, tokens), generator=rng, device=anatomy.device)
    slots = anatomy.slots
    read: list[torch.Tensor] = []
    first = [slot for slot in slots if slot.block == 0]
    return {
        "squares": lambda: visit_gradients(
            anatomy,
            slots,
            ids,
            loss=sampled_labels(0),
            visit=lambda _, gradient: read.append(gradient.float().square().sum()),
        ),
        "outputs": lambda: visit_outputs(
            anatomy, slots, ids, loss=next_tokens, visit=lambda _, seen: read.append(seen[1].float().square().sum())
        ),
        "hutchinson": lambda: hessian.hutchinson(anatomy, slots, ids, 0),
        "eigenvalue": lambda: hessian.top_eigenvalue(
            hessian.Curvature(anatomy, first, ids), len(first) - 1, iterations=1, seed=0
        ),
    }


def measured(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return seconds and gigabytes of a pass."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
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
    parser.add_argument("--passes", nargs="+", default=["squares", "outputs", "hutchinson", "eigenvalue"])
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    if arguments.again:
        backward.SHARE = 0.0
    anatomy = made(arguments)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in anatomy.model.parameters())
    facts = {"device": str(anatomy.device), "weights_gb": round(weights / 1e9, 2), **vars(arguments)}
    print(json.dumps(facts))
    kinds = passes(anatomy, arguments.tokens)
    for name in arguments.passes:
        print(json.dumps({"pass": name, **measured(kinds[name], anatomy.device)}), flush=True)


if __name__ == "__main__":
    main()
