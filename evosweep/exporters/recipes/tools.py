"""The tools that recipes are written for, by the name that ``export.format`` takes."""

from evosweep.exporters.recipes import (
    auto_round_recipe,
    evopress_recipe,
    exllamav3_recipe,
    gguf_toolkit_recipe,
    gptqmodel_recipe,
    llama_cpp_recipe,
    llm_compressor_recipe,
    mlx_lm_recipe,
    modelopt_recipe,
    torchao_recipe,
)
from evosweep.exporters.recipes.listing import Tool

TOOLS: dict[str, Tool] = {
    "llama_cpp": llama_cpp_recipe,
    "gptqmodel": gptqmodel_recipe,
    "auto_round": auto_round_recipe,
    "llm_compressor": llm_compressor_recipe,
    "modelopt": modelopt_recipe,
    "mlx_lm": mlx_lm_recipe,
    "exllamav3": exllamav3_recipe,
    "torchao": torchao_recipe,
    "evopress": evopress_recipe,
    "gguf_toolkit": gguf_toolkit_recipe,
}
