"""Gives a recipe to the tool that it is for: read_recipe.py <tool> <recipe folder> <dense model> <empty folder>.

Prints the bits of every layer as the tool understood them.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["TORCH_COMPILE_DISABLE"] = "1"


def read_auto_round(recipe: Path, model: str, out: str) -> dict[str, int]:
    """Rounds the model with auto-round, without its optimization, and returns the bits in the written config."""
    import transformers
    from auto_round import AutoRound

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    rounding = AutoRound(
        loaded,
        transformers.AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        layer_config=json.loads((recipe / "auto_round.json").read_text()),
        iters=0,
        disable_opt_rtn=True,
        low_gpu_mem_usage=False,
    )
    rounding.quantize_and_save(out, format="auto_round")
    (config,) = Path(out).rglob("config.json")
    written = json.loads(config.read_text())["quantization_config"]
    return {path: setting.get("bits", written["bits"]) for path, setting in written["extra_config"].items()}


def read_mlx_lm(recipe: Path, model: str, out: str) -> dict[str, int]:
    """Runs the README's own code and returns the bits of the layers in the model that it wrote."""
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    page = (recipe / "README.md").read_text().partition("## mlx-lm")[2]
    code = page.split("```")[1].replace("'tiny'", repr(model)).replace("'out'", repr(out))
    os.chdir(recipe)
    exec(code, {})
    made, _ = mlx_lm.load(out)
    return {path: module.bits for path, module in made.named_modules() if hasattr(module, "bits")}


def read_gptqmodel(recipe: Path, model: str, out: str) -> dict[str, int]:
    """Returns the bits that GPTQModel looks up for each layer in the configuration; 16 where it leaves it out."""
    del out
    import transformers  # before the stand-ins, so that it does not take them for torchvision

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)  # which does not load beside a CPU torch
    sys.modules["torchvision.transforms.functional"].InterpolationMode = None
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(**json.loads((recipe / "gptqmodel.json").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    linears = [path for path, module in loaded.named_modules() if type(module).__name__ == "Linear"]
    found = {path: config.dynamic_get(path, "bits", int(config.bits)) for path in linears}
    return {path: 16 if bits is False else int(bits) for path, bits in found.items()}


def read_torchao(recipe: Path, model: str, out: str) -> dict[str, int]:
    """Loads the model through transformers with the module's configuration; returns the bits of each weight's type."""
    del out
    import transformers

    scope: dict = {}
    exec((recipe / "torchao_config.py").read_text(), scope)
    config = transformers.TorchAoConfig(quant_type=scope["CONFIG"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")
    weights = {path: module.weight for path, module in loaded.named_modules() if type(module).__name__ == "Linear"}
    types = {path: str(getattr(weight, "target_dtype", "16")) for path, weight in weights.items()}
    return {path: int(name.removeprefix("torch.int")) for path, name in types.items()}


if __name__ == "__main__":
    tool, folder, dense, target = sys.argv[1:]
    bits = globals()[f"read_{tool}"](Path(folder), dense, target)
    sys.stdout.write("\n" + json.dumps(bits) + "\n")
