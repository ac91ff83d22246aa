"""Every choice and every experiment composes, and what it names exists."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from evosweep.cli.check import check_config
from evosweep.cli.main import CONF
from evosweep.core.budget import Budget
from evosweep.search.plan import Plan

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and list(folder.glob("*.yaml"))
}


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides], return_hydra_config=True)


def check(config) -> None:
    check_config(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), CONF)
    search = OmegaConf.to_container(config.search)
    Plan.of(**{key: value for key, value in search.items() if key not in {"offspring", "max_flips"}})
    Budget(**{key: value for key, value in config.budget.items() if not str(key).startswith("_")})


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes(experiment: str) -> None:
    config = composed(f"+experiment={experiment}")
    assert config.name == experiment
    check(config)


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS if group != "experiment" for choice in GROUPS[group]]
)
def test_every_choice_composes(group: str, choice: str) -> None:
    check(composed(f"{group}={choice}"))


def test_the_quickstart_sweeps_four_allocators_by_itself() -> None:
    config = composed("+experiment=quickstart")
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.hydra.sweeper.params.sampler == "uniform,owl,ilp_scaled,evopress_fisher"
    HydraConfig.instance().cfg = None


def test_every_module_of_a_plug_in_package_has_a_choice() -> None:
    """A sampler, compressor, fitness or source that no YAML names cannot be used."""
    text = "\n".join(path.read_text() for path in CONF.rglob("*.yaml"))
    package = Path(CONF).parent / "evosweep"
    for folder, shared in {
        "fitness": {"base"},
        "allocators": {"base", "formulas", "harm", "interactions", "quiet", "resolve"},
        "compressors": {
            "base",
            "code_tables",
            "column_order",
            "compensate",
            "descent",
            "entropy_kernel",
            "entropy_steps",
            "float_scales",
            "error_factors",
            "grid",
            "ggml_columns",
            "ggml_fit",
            "grid_search",
            "groups",
            "integer",
            "kernels",
            "nearest",
            "payload",
            "rotation",
            "rounding",
            "sparse",
            "statistics",
            "straight_through",
        },
        "samplers": {"base", "level_codes", "ranked_trials"},
        "exporters": {
            "base",
            "bit_stream",
            "card",
            "compressed_layers",
            "folder",
            "gguf_tensors",
            "gguf_tokenizer",
            "integer_layers",
            "proof",
        },
        "data": {
            "documents",
            "domains",
            "near_duplicates",
            "partition",
            "pictures",
            "sections",
            "table_rows",
            "text_library",
            "tokens",
        },
    }.items():
        for path in (package / folder).glob("*.py"):
            if path.stem not in shared | {"__init__"}:
                assert f"evosweep.{folder}.{path.stem}." in text, path
