"""Writes the logits that mlx-lm gives: mlx_logits.py <model folder> <tokens.npy> <logits.npy>."""

import json
import sys

import mlx.core as mx
import mlx_lm
import numpy as np


def main(folder: str, tokens: str, logits: str) -> None:
    """Loads a model as a user does, runs it on tokens (batch, seq_len), and writes fp32 logits."""
    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(folder)
    given = np.load(tokens)
    np.save(logits, np.array(model(mx.array(given)).astype(mx.float32)))
    layers = {
        path: [module.bits, module.group_size] for path, module in model.named_modules() if hasattr(module, "bits")
    }
    sys.stdout.write(json.dumps({"layers": layers, "template": tokenizer.chat_template}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
