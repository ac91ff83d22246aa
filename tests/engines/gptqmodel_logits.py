"""Writes the logits that GPTQModel gives: gptqmodel_logits.py <tokens.npy> <model folder>."""

import json
import os
import sys
from types import ModuleType

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes longer than a tiny model

import numpy as np
import torch
import transformers  # noqa: F401 - before the stand-ins, so that it does not take them for torchvision

# GPTQModel imports torchvision for image models, and the index's torchvision does not load beside a CPU torch.
STAND_INS = {
    name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
}
STAND_INS["torchvision.transforms.functional"].InterpolationMode = None
STAND_INS["torchvision"].transforms = STAND_INS["torchvision.transforms"]
sys.modules |= STAND_INS

from gptqmodel import BACKEND, GPTQModel  # noqa: E402


def main(tokens: str, folder: str) -> None:
    """Loads a model as a user does, and writes its logits of tokens (batch, seq_len), calculated in fp32."""
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    packed = {path: module.bits for path, module in model.named_modules() if hasattr(module, "qweight")}
    kinds = sorted({type(model.get_submodule(path)).__name__ for path in packed})
    dtype = str(model.dtype)
    with torch.inference_mode():
        given = torch.from_numpy(np.load(tokens))
        np.save(f"{folder}.npy", torch.nn.Module.float(model)(input_ids=given).logits.float().numpy())
    sys.stdout.write("\n" + json.dumps({"layers": packed, "kinds": kinds, "dtype": dtype}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
