"""Prints the log-probabilities that vLLM gives the tokens of prompts, as JSON: vllm_logits.py PROMPTS.json FOLDER ...

PROMPTS.json holds a list of lists of token ids. Of each folder's model one such list is printed, without first tokens.
vLLM's kernel for CPUs takes four bits alone, so a kernel that dequantizes any width is put before it, and the model
runs in float32; behind ``stock:`` a folder is run with vLLM's own kernel, in float16.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the registered kernel is this process's
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
from vllm.platforms import PlatformEnum


class Dequantized(MPLinearKernel):
    """Multiplies with the weight that the packed integers stand for, whatever their width."""

    @classmethod
    def get_min_capability(cls):
        return -1

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        bits = self.config.weight_type.size_bits
        codes = stream(layer.weight_packed, bits, self.config.partition_weight_shape[0]).float()
        zeros = torch.tensor(2.0 ** (bits - 1))
        if self.config.zero_points:
            zeros = stream(layer.weight_zero_point.T, bits, len(codes)).T.float().unsqueeze(-1)
        scales = layer.weight_scale.float().unsqueeze(-1)
        weight = (codes.unflatten(1, (scales.shape[1], -1)) - zeros) * scales
        layer.dense = weight.flatten(1).to(layer.weight_scale.dtype)

    def apply_weights(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.dense, bias)


def stream(words, bits, count):
    """Returns the numbers of a dense little-endian stream of bits in the 32-bit words of each row."""
    flags = (words.contiguous().unsqueeze(-1) >> torch.arange(32)) & 1
    numbers = flags.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    return (numbers << torch.arange(bits)).sum(-1)


def logprobs(folder, prompts, *, dtype):
    """Returns the log-probability of each prompt's tokens behind the first."""
    model = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        disable_log_stats=True,
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False)
    found = []
    for answer in model.generate(asked, sampling, use_tqdm=False):
        pairs = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
        found.append([entry[token].logprob for token, entry in pairs])
    del model
    cleanup_dist_env_and_memory()
    return found


def main():
    prompts = json.loads(Path(sys.argv[1]).read_text())
    kernels = linear._POSSIBLE_KERNELS
    stock = kernels[PlatformEnum.CPU]
    found = []
    for folder in sys.argv[2:]:
        own = folder.startswith("stock:")
        kernels[PlatformEnum.CPU] = stock if own else [Dequantized]
        found.append(logprobs(folder.removeprefix("stock:"), prompts, dtype="float16" if own else "float32"))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # its threads take their time


main()
