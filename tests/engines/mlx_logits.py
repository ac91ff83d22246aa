"""Writes the logits that mlx-lm gives beside each model: mlx_logits.py <tokens.npy> <model folder> ..."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main(tokens: str, *folders: str) -> None:
    """Loads models, writes their fp32 logits of tokens (batch, seq_len), prints bits and group of the last one's layers."""
    mx.set_default_device(mx.cpu)
    given = mx.array(np.load(tokens))
    layers = {}
    for folder in folders:
        model, _ = load_model(Path(folder))
        np.save(f"{folder}.npy", np.array(model(given).astype(mx.float32)))
        layers = {
            path: [module.bits, module.group_size] for path, module in model.named_modules() if "scales" in module
        }
    sys.stdout.write(json.dumps({"layers": layers}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
