"""Writes the logits that transformers gives with auto-round: auto_round_logits.py <tokens.npy> <model folder>."""

import json
import sys

import numpy as np
import torch
import transformers


def main(tokens: str, folder: str) -> None:
    """Loads a model as a user does, and writes its logits of tokens (batch, seq_len), calculated in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    packed = {path: module.bits for path, module in model.named_modules() if hasattr(module, "qweight")}
    kinds = sorted({type(model.get_submodule(path)).__module__ for path in packed})
    with torch.inference_mode():
        np.save(
            f"{folder}.npy", torch.nn.Module.float(model)(input_ids=torch.from_numpy(np.load(tokens))).logits.numpy()
        )
    sys.stdout.write(json.dumps({"layers": packed, "kinds": kinds, "dtype": str(model.dtype)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
